"""Push to a stand-in of the Hub and pull from it, through huggingface_hub's own requests."""

import os
import socket
import subprocess
import sys

import pytest
import tiny_runs
import torch
from hub_server import HubServer, commit_of, refusal
from loopback import Reply
from remote_deltas import contents_of, nothing_in, problem_of, refused_pull, save

from peftkit.registry.remotes import hub_client, pull, push, web

FILE = "adapter_model.safetensors"
ADDRESS = "hf://me/toy"


def hub_is_at(url, monkeypatch):
    """As HF_ENDPOINT would say, which huggingface_hub reads when it is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, in the Hub's place."""
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _detect_agent

    with HubServer() as running:
        hub_is_at(running.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # It would ask the Hub, once, which tools for agents there are.
        monkeypatch.setattr(_detect_agent, "_registry", _detect_agent._EMPTY_REGISTRY)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield running
        close_session()


@pytest.fixture
def on_hub(store, hub):
    done = push(store, "toy", ADDRESS)
    hub.asked.clear()
    return done


def test_what_is_pulled_is_what_was_pushed_to_the_byte(store, elsewhere, on_hub, capfd):
    stored = pull(elsewhere, ADDRESS)
    assert (str(stored), stored.digest) == ("toy@v1", on_hub.stored.digest)
    assert contents_of(elsewhere, "toy") == contents_of(store, "toy")
    assert on_hub.pinned == f"{ADDRESS}@{commit_of(2)}"
    assert str(pull(elsewhere, on_hub.pinned)) == "toy@v1"
    assert capfd.readouterr() == ("", "")


def test_a_repository_holds_the_files_the_documents_and_a_card(store, hub, on_hub):
    held = hub.repositories["me/toy"]["main"]
    files, info, manifest = contents_of(store, "toy")
    assert held == {
        **files,
        ".gitattributes": b"",
        "manifest.json": info,
        "oci-manifest.json": manifest,
        "README.md": held["README.md"],
    }


def test_pushing_again_sends_no_file(store, hub, on_hub):
    push(store, "toy", ADDRESS)
    assert hub.storage.paths("PUT") == [f"/{store.find('toy').files[FILE].sha256}"]
    assert hub.commits == 2


def test_a_branch_is_made_and_pulled_by_its_name(store, elsewhere, hub, on_hub):
    save(store, "toy", value=2.0)
    push(store, "toy@v2", f"{ADDRESS}@next")
    assert pull(elsewhere, f"{ADDRESS}@next", save_as="next").digest == store.find("toy@v2").digest
    assert pull(elsewhere, ADDRESS).digest == store.find("toy@v1").digest


def test_a_delta_of_another_kind_leaves_no_file_of_the_one_before(store, hub, on_hub):
    save(store, "heavy", kind="weights")
    push(store, "heavy", ADDRESS)
    assert sorted(hub.repositories["me/toy"]["main"]) == [
        ".gitattributes",
        "README.md",
        "manifest.json",
        "oci-manifest.json",
        "weights.safetensors",
    ]


def test_all_files_are_of_one_commit_though_another_push_comes_between(
    store, elsewhere, hub, on_hub
):
    save(store, "toy", value=2.0)
    first, hub.asked = hub.override, []

    def push_between(ask):
        if ask.path.endswith("oci-manifest.json") and ask.method == "GET" and hub.commits == 2:
            reply = hub.answer(ask)
            push(store, "toy@v2", ADDRESS)
            return reply
        return first(ask)

    hub.override = push_between
    assert pull(elsewhere, ADDRESS).digest == store.find("toy@v1").digest
    assert hub.commits == 3


def test_a_commit_is_not_pushed_to(store, hub):
    address = f"{ADDRESS}@{commit_of(7)}"
    assert problem_of(push, store, "toy", address) == (
        f"{address}: a commit follows from what is pushed; name a branch, such as hf://me/toy@main"
    )
    assert hub.asked == []


def test_the_token_goes_to_the_hub_and_to_no_other_host(store, elsewhere, hub):
    hub.tokens = {"hf_secret"}
    push(store, "toy", ADDRESS)
    pull(elsewhere, ADDRESS)
    assert {ask.headers["authorization"] for ask in hub.asked} == {"Bearer hf_secret"}
    assert len(hub.storage.asked) == 2
    assert not [ask for ask in hub.storage.asked if "authorization" in ask.headers]


def test_a_check_of_an_upload_at_another_host_gets_no_token(store, hub):
    """huggingface_hub would send it to wherever the answer says."""

    def away(ask):
        if not ask.path.endswith("objects/batch"):
            return None
        wanted = ask.json()["objects"][0]
        links = {
            step: {"href": f"{hub.storage.url}/{wanted['oid']}"} for step in ("upload", "verify")
        }
        return Reply.of({"objects": [{**wanted, "actions": links}]})

    hub.override = away
    hub.storage.override = lambda ask: Reply(200) if ask.method == "POST" else None
    push(store, "toy", ADDRESS)
    assert [ask.method for ask in hub.storage.asked] == ["PUT", "POST"]
    assert not [ask for ask in hub.storage.asked if "authorization" in ask.headers]


LOGIN = "log in with `hf auth login`"


@pytest.mark.parametrize(
    ("address", "reply", "said"),
    [
        (
            "hf://me/none",
            None,
            f"no such repository, or a private one (HTTP 404); check the name, or {LOGIN}",
        ),
        ("hf://me/toy@v9", None, "no revision 'v9' (HTTP 404); check the address"),
        (
            ADDRESS,
            refusal(404, "EntryNotFound"),
            "not a delta, it has no oci-manifest.json (HTTP 404)",
        ),
        (
            ADDRESS,
            refusal(403, "GatedRepo"),
            f"gated (HTTP 403); ask for access on its page, then {LOGIN}",
        ),
        (
            ADDRESS,
            Reply(401),
            f"authentication needed (HTTP 401); {LOGIN}, with a token that may do this",
        ),
        (ADDRESS, Reply(503), "the Hub refused (HTTP 503); try again later"),
    ],
)
def test_a_refusal_of_a_pull_is_one_line(elsewhere, hub, on_hub, address, reply, said):
    hub.override = lambda ask: reply
    assert refused_pull(elsewhere, address) == f"{address}: {said}"


def test_a_missing_file_is_named(elsewhere, hub, on_hub):
    del hub.repositories["me/toy"]["main"][FILE]
    assert refused_pull(elsewhere, ADDRESS) == (
        f"{ADDRESS}: {FILE} is missing (HTTP 404); push it again or pull another"
    )


def test_a_push_without_a_login_says_how_to_get_one(store, hub, capfd):
    hub.tokens = set()
    assert problem_of(push, store, "toy", ADDRESS) == (
        f"{ADDRESS}: no such repository, or a private one "
        f"(HTTP 401, Invalid username or password.); check the name, or {LOGIN}"
    )
    hub.override = lambda ask: Reply.of({"error": "no\n\x1b[31m write"}, 403)
    assert problem_of(push, store, "toy", ADDRESS) == (
        f"{ADDRESS}: authentication needed (HTTP 403, no [31m write); "
        f"{LOGIN}, with a token that may do this"
    )
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_is_busy_is_not_waited_for(store, hub):
    hub.override = lambda ask: Reply(429, headers={"Retry-After": "86400"})
    assert problem_of(push, store, "toy", ADDRESS) == (
        f"{ADDRESS}: too many requests; try again in 86400 seconds"
    )


def test_the_hub_switched_off_is_said(store, elsewhere, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = f"{ADDRESS}: HF_HUB_OFFLINE is set; unset it to reach the Hub"
    assert refused_pull(elsewhere, ADDRESS) == expected
    assert problem_of(push, store, "toy", ADDRESS) == expected
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_said_at_once(store, elsewhere, hub, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        hub_is_at(url, monkeypatch)
        expected = f"{ADDRESS}: cannot be reached (Connection refused); "
        expected += "check the address and the network"
        assert refused_pull(elsewhere, ADDRESS) == expected
        assert problem_of(push, store, "toy", ADDRESS) == expected


def test_a_hub_on_another_machine_needs_https(store, elsewhere, hub, monkeypatch):
    hub_is_at("http://hub.example", monkeypatch)
    expected = f"{ADDRESS}: http://hub.example is not https; plain http is for this machine only"
    assert refused_pull(elsewhere, ADDRESS) == expected
    assert problem_of(push, store, "toy", ADDRESS) == expected


def test_a_hub_that_never_answers_is_given_up(store, elsewhere, hub, monkeypatch):
    monkeypatch.setattr(web, "READ_SECONDS", 0.2)
    monkeypatch.setitem(hub_client.TIMEOUT, "read", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        hub_is_at(url, monkeypatch)
        expected = f"{ADDRESS}: no answer in time; check the network, then try again"
        assert refused_pull(elsewhere, ADDRESS) == expected
        assert problem_of(push, store, "toy", ADDRESS) == expected


def test_a_changed_file_is_refused(store, elsewhere, hub, on_hub):
    expected = store.find("toy").files[FILE]
    whole = hub.large[expected.sha256]
    hub.large[expected.sha256] = whole[:-1] + bytes([whole[-1] ^ 1])
    said = refused_pull(elsewhere, ADDRESS)
    assert said.startswith(f"{ADDRESS}: {FILE}: changed, expected {expected}, found sha256:")
    hub.large[expected.sha256] = whole[:-5]
    assert refused_pull(elsewhere, ADDRESS) == (
        f"{ADDRESS}: {FILE}: cut short, expected {expected.size} bytes, "
        f"found {expected.size - 5}; try again"
    )
    hub.large[expected.sha256] = whole + b"x" * 5_000_000
    assert refused_pull(elsewhere, ADDRESS) == (
        f"{ADDRESS}: {FILE}: more than {expected.size} bytes; refused"
    )


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_private_address_is_not_asked(store, elsewhere, hub, on_hub, direction):
    inside = "https://169.254.169.254/latest"
    expected = (
        f"{ADDRESS}: leads to 169.254.169.254 at the link-local address 169.254.169.254; refused, "
        "from there only loopback and public addresses are allowed"
    )
    if direction == "pull":
        hub.override = lambda ask: Reply(302, headers={"Location": inside})
        assert refused_pull(elsewhere, ADDRESS) == expected
        return
    save(store, "toy", value=2.0)
    hub.storage.url = inside
    assert problem_of(push, store, "toy", ADDRESS) == expected
    assert hub.commits == 2


def test_a_push_that_fails_half_way_commits_nothing_and_is_completed(store, elsewhere, hub):
    broken = Reply.of({"error": "out of order"}, 500)
    hub.override = lambda ask: broken if "/commit/" in ask.path else None
    assert problem_of(push, store, "toy", ADDRESS) == (
        f"{ADDRESS}: the Hub refused (HTTP 500, out of order); try again later"
    )
    assert list(hub.repositories["me/toy"]["main"]) == [".gitattributes"]
    hub.override, hub.storage.asked = (lambda ask: None), []
    push(store, "toy", ADDRESS)
    assert hub.storage.asked == []  # the tensors are there since the first try
    pull(elsewhere, ADDRESS)
    assert contents_of(elsewhere, "toy") == contents_of(store, "toy")


def test_the_client_is_as_before_when_a_push_is_over(store, hub):
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http, are_progress_bars_disabled, logging

    before = (_http._GLOBAL_CLIENT_FACTORY, are_progress_bars_disabled(), logging.get_verbosity())
    hooks = len(get_session().event_hooks["request"])
    push(store, "toy", ADDRESS)
    after = (_http._GLOBAL_CLIENT_FACTORY, are_progress_bars_disabled(), logging.get_verbosity())
    assert (after, len(get_session().event_hooks["request"])) == (before, hooks)


OPEN = """
import sys
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=2)
model = PeftModel.from_pretrained(base, "me/toy")
moved = [p for name, p in model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
print(len(moved))
"""


@pytest.mark.slow
def test_peft_alone_opens_what_lies_on_the_hub(elsewhere, hub, base_of, tmp_path):
    folder, method = base_of("bert"), tiny_runs.make_method({"type": "lora", "r": 2})
    model = tiny_runs.prepare(folder, method)
    with torch.no_grad():
        [p.add_(1.0) for p in model.parameters() if p.requires_grad]
    delta = method.delta(model)
    elsewhere.save("toy", delta, tiny_runs.info_for(folder, method, delta))
    push(elsewhere, "toy", ADDRESS)
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_nothing_is_half_stored_when_the_second_file_is_not_there(elsewhere, hub, on_hub):
    hub.override = lambda ask: Reply(500) if ask.path.endswith(FILE) else None
    refused_pull(elsewhere, ADDRESS)
    assert nothing_in(elsewhere)
    hub.override = lambda ask: None
    assert str(pull(elsewhere, ADDRESS)) == "toy@v1"
