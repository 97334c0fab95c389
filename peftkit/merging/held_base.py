"""The tensors of a base as a run held them, one at a time.

Called by `folding`; stands on `modeling`. A delta was trained over a base that may have been
rounded to 16 or to 4 bits, and is folded into exactly that one.
"""

from pathlib import Path

import torch
from torch import Tensor

from peftkit.errors import RegistryError
from peftkit.modeling.base_tensors import BaseTensors
from peftkit.modeling.four_bit import four_bit_config, four_bit_weights, rounded
from peftkit.modeling.loading import held_dtype, skeleton, spec_config
from peftkit.registry.fitting import load_options, model_spec
from peftkit.registry.manifest import DeltaInfo


class HeldBase:
    """Float32 values of a base's tensors by the names of the model that a run built."""

    def __init__(self, folder: Path, info: DeltaInfo, *, exact: bool = False) -> None:
        """With `exact`, the values are those of the files instead.

        Raises:
            SourceError: the base has no such architecture.
        """
        spec, options = model_spec(info), load_options(info)
        self.files = BaseTensors(folder)
        self._exact = exact
        self.held = held_dtype(spec, options) if options.frozen else torch.float32
        """Dtype of what the run did not train and did not hold in 4 bits."""
        self.quantisation = options.quantisation
        self.four_bit: dict[str, bool] = {}
        """Name of each weight that the run held in 4 bits → whether it is stored (I, O)."""
        if self.quantisation:
            shell = skeleton(spec, spec_config(folder, spec))
            config = four_bit_config(self.quantisation, self.held, shell)
            self.four_bit = four_bit_weights(shell, config)

    def stored(self, name: str) -> Tensor:
        """As the files have it, in memory that a file is mapped to.

        Raises:
            RegistryError: they have no such tensor.
        """
        tensor = self.files(name)
        if tensor is None:
            raise RegistryError(f"{name}: the base's files hold no such tensor")
        return tensor

    def as_held(self, name: str) -> Tensor:
        """As the run held it, in the dtype in which it did; float32 or a file's own with `exact`.

        Raises:
            RegistryError: the files have no such tensor.
        """
        tensor = self.stored(name)
        if self._exact or not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(self.held)
        if name in self.four_bit and self.quantisation:
            return rounded(tensor, self.quantisation, transposed=self.four_bit[name])
        return tensor

    def __call__(self, name: str) -> Tensor:
        """As the run held it, a float32 copy that may be written to.

        Raises:
            RegistryError: the files have no such tensor.
        """
        return self.as_held(name).to(torch.float32, copy=True)
