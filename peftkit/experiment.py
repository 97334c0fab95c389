"""One run, from a recipe to a stored delta and a record: the whole story on one page.

Called by `run.py`. Puts the rooms together and holds none of their knowledge.
"""

import sys
from contextlib import closing
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoTokenizer

from peftkit import plugins
from peftkit.contracts import Delta, Method, Task, TaskData
from peftkit.errors import DataError, Interrupted, PeerError, RegistryError, ResumeError, RunError
from peftkit.memory.meter import MemoryMeter
from peftkit.modeling.base import resolve_base
from peftkit.modeling.loading import ModelSpec, held_dtype, load_model
from peftkit.modeling.parameters import (
    checkpoint_activations,
    count_parameters,
    position_limit,
    set_precision,
)
from peftkit.planning.of_run import fitting_batch, foresee
from peftkit.recipe import Recipe
from peftkit.registry import DeltaInfo, Registry, default_root, root_problem
from peftkit.registry.names import check_name
from peftkit.reporting.predictions import write_predictions
from peftkit.reporting.record import RunRecord, Status, write_record
from peftkit.run_facts import RunFacts, lost_process, status_of, worded
from peftkit.run_folder import OnExists, claimed, note_recipe
from peftkit.training.batch_size import is_out_of_memory
from peftkit.training.checkpoints import CheckpointFolder
from peftkit.training.evaluation import Evaluation
from peftkit.training.loop import Trainer
from peftkit.training.peers import leave_word, word
from peftkit.training.sharded import is_fsdp, make_whole
from peftkit.training.signals import StopRequest
from peftkit.training.start import place, refuse_unlike, start_accelerator
from peftkit.training.state import Job
from peftkit.training.trackers import Trackers, refuse_missing

PREDICTIONS = "predictions.parquet"


def run_experiment(recipe: Recipe, *, on_exists: OnExists = "refuse") -> RunRecord:
    """Train, score and store what the recipe says; leave a record however it ends.

    Args:
        recipe: What to run.
        on_exists: What to do if the run's folder is there already.

    Raises:
        PeftkitError: the run could not start, or did not complete; in the latter case the record
            in the run's folder says so too.
    """
    refuse_missing(recipe.training.report_to)
    _, method = _build(recipe)
    quantised = method.load_options().quantisation is not None
    accelerator = start_accelerator(recipe.training, quantised=quantised)
    check_name(recipe.name)
    if problem := root_problem(default_root()):
        raise RunError(f"registry {default_root()}: {problem}; name another in PEFTKIT_REGISTRY")
    names = recipe.training.report_to if accelerator.is_main_process else []
    with (
        StopRequest().listening() as stop,
        claimed(recipe.run_folder, recipe, accelerator, on_exists=on_exists),
        closing(Trackers(names, recipe.run_folder, recipe.resolved())) as trackers,
    ):
        meter = MemoryMeter(accelerator.device)
        return _recorded(RunFacts(recipe, accelerator, meter, trackers), stop, on_exists)


def _recorded(facts: RunFacts, stop: StopRequest, on_exists: OnExists) -> RunRecord:
    """Carry the run out, and leave a record however it ends."""
    try:
        _carry_out(facts, stop, on_exists)
    except ResumeError:
        raise
    except BaseException as error:  # however it ended, the record comes first
        stop.is_over = True
        reason = _reason(error, stop, is_main=facts.accelerator.is_main_process)
        _finish(facts, status_of(reason), reason)
        if is_out_of_memory(error):
            raise RunError(_out_of_memory_line(facts)) from error
        if reason is not error:
            raise reason from error
        raise
    record = _finish(facts, "completed")
    if facts.accelerator.is_main_process:
        CheckpointFolder(facts.recipe.run_folder / "checkpoints").clear()
    return record


def _reason(error: BaseException, stop: StopRequest, *, is_main: bool) -> BaseException:
    """What ended the run: `error`, or what it is in the first process if another one failed.

    There that is a lost connection, or the signal of a launcher that stops all of them.
    """
    lost = lost_process(error)
    is_own = lost is None and not isinstance(error, Interrupted)
    if is_own and not is_main:
        leave_word(status_of(error), worded(error))
    if is_own:
        return error
    if is_main and (left := word()):
        return PeerError(*left)
    return Interrupted(stop.number) if lost and stop.number else lost or error


def _carry_out(facts: RunFacts, stop: StopRequest, on_exists: OnExists) -> None:
    recipe, accelerator, meter = facts.recipe, facts.accelerator, facts.meter
    task, method = _build(recipe)
    base = resolve_base(recipe.base)
    facts.note_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    with facts.timed("tokenise"):
        data = facts.data = task.load(tokenizer, seed=recipe.seed)
    stop.check()
    _say(accelerator, f"base: {recipe.base.name}, from {base.origin}", *_data_lines(data))

    spec, options = _model_spec(facts, task, data), method.load_options()
    refuse_unlike(accelerator, facts.conditions())
    if accelerator.is_main_process:
        facts.predicted = foresee(recipe, data, spec, accelerator)
    set_seed(recipe.seed)
    with facts.timed("load"), meter.phase("load"):
        model = load_model(base.path, spec, options, to_be_sharded=is_fsdp(accelerator))
        model.name_or_path = recipe.base.name  # PEFT writes it into the adapter's files
        _check_lengths(model, data)
        prepared = method.prepare(model)
        set_precision(prepared, held_dtype(spec, options))
        place(prepared, accelerator)
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model)
    facts.parameters = count_parameters(prepared)
    _say(accelerator, "training {:,} of {:,} parameters".format(*facts.parameters))

    groups = method.parameter_groups(prepared, recipe.training.learning_rate)
    folder = recipe.run_folder
    job = Job(
        model=prepared,
        groups=groups,
        task=task,
        train=data.train,
        holdout=data.holdout,
        config=recipe.training,
        seed=recipe.seed,
        folder=folder,
        conditions=facts.conditions(),
        trackers=facts.trackers,
    )
    trainer = Trainer(job, accelerator, meter)
    if on_exists == "resume-weights-only":
        _begin_anew(facts, trainer)
    try:
        trainer.fit(stop, resume=on_exists.startswith("resume"))
    finally:
        facts.training = trainer.state

    scored = facts.validation = trainer.evaluator.evaluate(trainer.model, task, data.validation)
    _track(facts, scored)
    stop.check()
    stop.is_over = True  # what is left is little, and half of it would be done twice
    make_whole(trainer.model)
    if accelerator.is_main_process:
        write_predictions(folder / PREDICTIONS, scored.columns)
        facts.predictions = PREDICTIONS
        delta = method.delta(accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
        _store(facts, delta, facts.delta_info(delta, spec, options), base.path)
    accelerator.wait_for_everyone()


def _check_lengths(model: nn.Module, data: TaskData) -> None:
    """Refuse examples for which the model has no positions."""
    splits = [split for split in (data.train, data.holdout, data.validation) if split]
    longest, limit = max(max(split.lengths) for split in splits), position_limit(model)
    if limit is not None and longest > limit:
        raise DataError(
            f"the longest example has {longest} tokens, and the base has positions for {limit}; "
            f"set task.max_length to {limit} or less"
        )


def _store(facts: RunFacts, delta: Delta, info: DeltaInfo, base: Path) -> None:
    """Put the delta into the registry."""
    try:
        registry = Registry(default_root())
        facts.stored = registry.save(facts.recipe.name, delta, info, base=base)
    except RegistryError as error:
        kept = "the run's checkpoint is kept: once that is mended, --resume stores the delta"
        raise RegistryError([*error.problems, kept]) from error


def _track(facts: RunFacts, scored: Evaluation) -> None:
    """Hand the validation scores to the trackers."""
    scores = {f"validation_{name}": value for name, value in scored.metrics.items()}
    facts.trackers.log({"step": facts.training.step, **scores})


def _begin_anew(facts: RunFacts, trainer: Trainer) -> None:
    """Take the weights of the last checkpoint; from now on the folder is a run of this recipe."""
    trainer.snapshots.begin_with_weights()
    if facts.accelerator.is_main_process:
        note_recipe(facts.recipe)


def _build(recipe: Recipe) -> tuple[Task, Method]:
    """The task and the method that the recipe's sections configure."""
    resolved = recipe.resolved()
    task = plugins.load("tasks", resolved["task"]["type"])(recipe.task)
    return task, plugins.load("methods", resolved["method"]["type"])(recipe.method)


def _model_spec(facts: RunFacts, task: Task, data: TaskData) -> ModelSpec:
    config = task.model_options(data)
    auto_class = config.pop("auto_class")
    dropout = facts.recipe.training.dropout
    facts.spec = ModelSpec(auto_class, config, dropout, facts.accelerator.mixed_precision)
    return facts.spec


def _finish(facts: RunFacts, status: Status, error: BaseException | None = None) -> RunRecord:
    """Make the record, and write it from the main process; `error` is worth more than a record."""
    record = facts.record(status, error)
    if facts.accelerator.is_main_process:
        path = facts.recipe.run_folder / "record.json"
        try:
            write_record(path, record)
        except OSError as full:
            if error is None:
                done = f"the delta is stored as {record.delta}"
                raise RunError(f"{path}: cannot be written: {full.strerror}; {done}") from full
            _say(facts.accelerator, f"the record cannot be written either: {full.strerror}")
    return record


def _data_lines(data: TaskData) -> list[str]:
    sizes = [f"{len(s.rows)} {s.name}" for s in (data.train, data.holdout, data.validation) if s]
    lines = [f"data: {', '.join(sizes)} examples, from {data.origin}"]
    lines += [f"data: {name.replace('_', ' ')}: {n}" for name, n in data.cleaning.items() if n]
    if data.stand_in:
        lines.append("data: a SAMPLE that peftkit made itself; it stands in for the real data set")
    return lines


def _out_of_memory_line(facts: RunFacts) -> str:
    training = facts.recipe.training
    if facts.meter.last_phase == "eval":
        size = training.per_device_eval_batch_size
        return (
            f"out of memory while scoring; halve training.per_device_eval_batch_size ({size}), "
            "which changes no score"
        )
    if facts.meter.last_phase != "train_step":
        return "out of memory before training; take a smaller base, or method.type: qlora"
    size = facts.train_batch.per_device_train_batch_size
    checkpointing = (
        "" if training.gradient_checkpointing else "set training.gradient_checkpointing: true"
    )
    if facts.train_batch.found and size % 2:
        tried = f"training.auto_batch_size got as far as {size}, which is odd"
        return f"out of memory; {tried}; {checkpointing or 'take a smaller base'}"
    by_itself = "" if training.auto_batch_size else " (training.auto_batch_size: true does both)"
    line = (
        f"out of memory; halve training.per_device_train_batch_size ({size}) and double "
        f"training.gradient_accumulation_steps, which changes nothing else{by_itself}"
    )
    fitting = _planned(facts, size)
    return "; ".join(
        [
            f"{line}, or {checkpointing}" if checkpointing else line,
            *([f"the planner expects {fitting} examples to fit"] if fitting else []),
        ]
    )


def _planned(facts: RunFacts, size: int) -> int | None:
    """The largest batch below `size` that the planner would let through."""
    if facts.data is None or facts.spec is None:
        return None
    found = fitting_batch(facts.recipe, facts.data, facts.spec, facts.accelerator, size)
    return None if found == size else found


def _say(accelerator: Accelerator, *lines: str) -> None:
    """Tell the person, once for all processes."""
    if accelerator.is_main_process:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
