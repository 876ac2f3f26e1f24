"""An institution's own models after a run: its own command, on its own machine, for itself."""

import csv
import dataclasses
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from typer.testing import CliRunner

from cli.main import app as cli
from client import app, config_policy, home_command, releases, settings
from client.ledger import Ledger
from client.local_parts import LocalParts
from fedlora.config.config import UNRELEASED
from fedlora.data import data, records
from fedlora.errors import InputError, Refusal
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.models.model_files import ONE_INSTITUTION
from fedlora.privacy.composition import Event
from fedlora.runs import finished_run
from fedlora.wire import released, wire
from fedlora.wire.messages import Release
from simulation.engines.grid import identify
from simulation.result import Result
from tests.samples import write_csv

LABELS = ["card", "fraud", "loan"]
RUN = "0123456789abcdef"
NONE = float("inf")
BEHIND = {"run": "before", "source": "pilot.csv", "private": False}


@dataclasses.dataclass
class Bank:
    """A bank's directory, its settings, and the run as its server configured it."""

    directory: object
    config: object

    @property
    def settings(self):
        return self.directory / "institution.toml"

    def load(self):
        return settings.load(str(self.settings))

    def set(self, **changes):
        kept = dict(line.split(" = ", 1) for line in self.settings.read_text().splitlines())
        kept |= {key.replace("_", "-"): json.dumps(value) for key, value in changes.items()}
        self.settings.write_text("".join(f"{key} = {value}\n" for key, value in kept.items()))

    def followed(self):
        return config_policy.apply(self.load(), self.config.flat())

    def work(self):
        return trainable.load(self.followed(), tuple(LABELS))

    def adapter(self):
        """An adapter as of a finished run: not the one that training starts from."""
        torch.manual_seed(3)
        start = self.work().start
        return AdapterState({name: t + 0.02 * torch.randn_like(t) for name, t in start.items()})

    def release(self, **changes):
        work = self.work()
        made = Release(
            run=RUN,
            name="first",
            round=3,
            base=work.base.digest,
            origins=[BEHIND],
            adapter=self.adapter(),
        )
        return dataclasses.replace(made, **changes)

    def receive(self, release):
        """The bank's reply to a release."""
        identify()
        content = wire.pack_order(release, wire.pack_adapter(release.adapter))
        context = Context(
            run_id=1,
            node_id=1,
            node_config={"settings": str(self.settings)},
            state=RecordDict(),
            run_config=self.config.flat(),
        )
        return app.app(Message(content, 1, wire.RELEASED), context).content

    def home(self, *arguments, code=0):
        done = CliRunner().invoke(cli, ["home", str(self.settings), *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done

    def result(self, *arguments):
        return json.loads(self.home(*arguments, "--json").stdout)

    def refused(self, *arguments):
        """The one line of an error, once it is sure that nothing was written."""
        said = self.home(*arguments, code=2).stderr.splitlines()
        assert not (self.directory / "state" / "home" / "first").exists()
        return said[-1]

    def charges(self):
        with Ledger.open(self.directory / "ledger.db") as ledger:
            return ledger.show()["entries"]


@pytest.fixture
def bank(tmp_path, tiny_encoder, complaints, tiny_config):
    """Makes a bank with 80 records, 40 held-out rows and a ledger; values are of the run."""
    with complaints.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bank"] == "Alpha"]

    def make(**values):
        config = tiny_config(
            **{
                "data.source": "institutions",
                "data.institutions": 4,
                "data.labels": json.dumps(LABELS),
                "privacy.noise": "secure",
                "home.method": "interpolate",
                "home.steps": 4,
                **values,
            }
        )
        made = Bank(tmp_path, config)
        write_csv(tmp_path / "own.csv", rows[:80])
        write_csv(tmp_path / "test.csv", rows[80:])
        made.settings.write_text("")
        made.settings.chmod(0o600)
        made.set(
            name="Alpha",
            source="own.csv",
            test_source="test.csv",
            labels=LABELS,
            ledger="ledger.db",
            state="state",
            models=[str(tiny_encoder)],
            strategies=["fedavg", "fedsa", "exact"],
            max_delta=1e-4,
            without_dp=True,
        )
        Ledger.create(tmp_path / "ledger.db", max_epsilon=9.0, delta=1e-4, accountant="prv")
        return made

    return make


def _stored(bank):
    return sorted(path.name for path in (bank.directory / "state" / "released").glob("*"))


# The released adapter.


def test_a_released_adapter_is_stored_and_the_reply_holds_the_name_and_nothing_else(bank):
    made = bank()
    release = made.release()
    reply = made.receive(release)
    assert list(reply) == ["evaluation"]
    said = {**reply["evaluation"], "nonce": ""}  # the nonce is of this message
    assert said == {"institution": "Alpha", "metrics": "{}", "nonce": ""}
    assert _stored(made) == [RUN]
    found = releases.Releases(made.directory / "state").find("first")
    stored = found.adapter(made.work(), residuals=False)
    assert all(torch.equal(stored[name], tensor) for name, tensor in release.adapter.items())
    again = config_policy.apply(made.load(), found.config)
    assert again.fingerprint() == made.followed().fingerprint()
    assert not {"run-dir", "data.test-source", "privacy.ledger"} & set(found.config)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"base": "0" * 64}, "base-mismatch"),
        ({"adapter": AdapterState({"x.lora_A.weight": torch.zeros(2, 3)})}, "adapter-mismatch"),
        ({"name": "../first"}, "malformed-message"),
        ({"name": ""}, "malformed-message"),
        ({"run": "../run"}, "malformed-message"),
        ({"round": -1}, "malformed-message"),
    ],
)
def test_a_release_that_does_not_fit_the_run_is_refused_and_not_stored(bank, changes, code):
    made = bank()
    with pytest.raises(Refusal) as caught:
        wire.unpack_evaluation(made.receive(made.release(**changes)))
    assert caught.value.code == code
    assert _stored(made) == []


def test_a_release_of_a_run_that_the_settings_forbid_is_not_stored(bank):
    made = bank()
    release = made.release()
    made.set(strategies=["ffa"])
    with pytest.raises(Refusal, match="strategy-not-allowed"):
        wire.unpack_evaluation(made.receive(release))
    assert _stored(made) == []


def test_a_release_that_comes_again_replaces_the_first_one_and_the_oldest_go(bank, monkeypatch):
    monkeypatch.setattr(releases, "MAX_RELEASES", 2)
    made = bank()
    release = made.release()
    for run in ("a1", "a2", "a2", "a3"):
        made.receive(dataclasses.replace(release, run=run))
    assert _stored(made) == ["a2", "a3"]


def test_a_release_that_was_being_replaced_when_the_node_was_killed_is_found(bank):
    made = bank()
    release = made.release()
    made.receive(release)
    stored = made.directory / "state" / "released"
    (stored / RUN).rename(stored / f".old-{RUN}")
    (stored / ".new-x").mkdir()
    assert releases.Releases(made.directory / "state").find(RUN).run == RUN
    made.receive(dataclasses.replace(release, run="another"))
    assert releases.Releases(made.directory / "state").find(RUN).run == RUN
    made.receive(release)
    assert sorted(path.name for path in stored.iterdir()) == sorted([RUN, "another"])


def test_a_released_adapter_has_the_parts_that_stayed_at_the_institution(bank):
    made = bank(**{"federation.strategy": "fedsa"})
    release = made.release()
    local = release.adapter.only(("B", "magnitude"))
    mine = AdapterState({name: torch.full_like(t, 0.5) for name, t in local.items()})
    kept = LocalParts(
        made.directory / "state" / "kept", RUN, made.followed().fingerprint(*UNRELEASED)
    )
    kept.store(3, mine)
    made.receive(release)
    stored = AdapterState.open(made.directory / "state" / "released" / RUN)
    assert all(torch.equal(stored[name], tensor) for name, tensor in mine.items())
    handed = made.directory / "state" / "released" / RUN
    assert "under fedsa a part of the adapter stays" in made.refused("--adapter", handed)


# The command.


def test_the_command_trains_compares_and_writes_own_and_sends_and_charges_nothing(
    bank, monkeypatch
):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    made = bank()
    made.receive(made.release())

    def connect(*_):
        raise AssertionError("the command opens a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    result = made.result("--run", "first")
    out = made.directory / "state" / "home" / "first"
    assert result["directory"] == str(out) and result["run"] == RUN
    assert result["held_out"] == {"rows": 40, "from": "test-source"}
    assert json.loads((out / "result.json").read_text()).items() <= result.items()
    assert result["gain"]["mean"] == pytest.approx(
        result["own"]["accuracy"] - result["alone"]["accuracy"]
    )
    assert result["gain"]["low"] <= result["gain"]["mean"] <= result["gain"]["high"]
    assert result["gain"]["texts"] == 40
    few = result | {"gain": {"mean": 1.0, "low": 1.0, "high": 1.0, "texts": 9}}
    said = " ".join(home_command.report(few))
    assert "no difference that these rows can show" in said and "too few to tell" in said
    assert made.charges() == []
    assert out.stat().st_mode & 0o077 == 0
    assert "must not leave" in (out / "own" / "README.md").read_text()
    assert "test-source" not in (out / "report.txt").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(
        made.config.model.name, num_labels=3, trust_remote_code=False
    )
    PeftModel.from_pretrained(base, str(out / "own"), trust_remote_code=False)
    left = {path.name for path in (made.directory / "state").iterdir()}
    assert left == {"released", "home"}


def test_flags_of_the_institution_win_over_the_wish_of_the_run(bank):
    made = bank(**{"home.steps": 10**9, "home.method": "none"})
    made.receive(made.release())
    whole = made.result("--run", "first", "--steps", 4)
    assert whole["origins"][1:] == [BEHIND]
    wished = whole["choices"]
    assert wished["steps"] == 4
    out = made.directory / "other"
    assert made.result("--run", "first", "--steps", 2, "--out", out)["choices"]["steps"] == 2


def test_without_a_test_source_rows_are_held_back_and_the_command_says_so(bank):
    made = bank()
    made.receive(made.release())
    made.set(test_source="")
    said = made.home("--run", "first").stdout
    assert "test-source" in said
    result = json.loads((made.directory / "state" / "home" / "first" / "result.json").read_text())
    rows = result["held_out"]["rows"]
    assert result["held_out"]["from"] == "split" and 10 <= rows <= 20
    assert result["records"] + rows <= 80


def test_where_no_row_is_held_out_the_error_says_of_how_many(bank):
    made = bank()
    made.receive(made.release())
    rows = (made.directory / "own.csv").read_text().splitlines(keepends=True)
    (made.directory / "few.csv").write_text("".join([rows[0], *rows[6:9]]))
    made.set(source="few.csv", test_source="")
    said = made.refused("--run", "first")
    assert "few.csv can be held out" in said


def test_where_the_ledger_is_of_other_records_than_given_now_the_command_says_so(bank):
    made = bank()
    made.receive(made.release())
    config = made.followed()
    event = Event(noise_multiplier=1.0, sample_rate=0.5, steps=1)
    with Ledger.open(made.directory / "ledger.db") as ledger:
        ledger.bind(records.load(config).train(0).fingerprint, config.privacy.unit)
        charge = {"round_number": 1, "order_digest": "00", "event": event}
        ledger.charge(run_id=RUN, max_steps_of_run=1, **charge)
    paying = made.result("--run", "first", "--out", made.directory / "one")
    assert paying["held_out"]["from"] == "test-source"
    rows = (made.directory / "own.csv").read_text().splitlines(keepends=True)
    (made.directory / "fewer.csv").write_text("".join(rows[:60]))
    (made.directory / "apart.csv").write_text("".join([rows[0], *rows[60:]]))
    made.set(source="fewer.csv", test_source="apart.csv")
    assert made.result("--run", "first")["held_out"]["from"] == "other-records"
    (made.directory / "ledger.db").unlink()
    again = made.result("--run", "first", "--out", made.directory / "two")
    assert again["held_out"]["from"] == "no-ledger"


def test_the_adapter_that_the_operator_hands_out_gives_the_same_models(bank, tmp_path):
    made = bank()
    release = made.release()
    made.receive(release)
    handed = tmp_path / "handed"
    release.adapter.save(handed, made.work().model)
    released.describe(handed, release, made.config.public())
    arrived = made.result("--run", "first", "--out", tmp_path / "one")
    given = made.result("--adapter", handed, "--out", tmp_path / "two")
    changing = {"seconds", "directory"}
    assert {k: v for k, v in arrived.items() if k not in changing} == {
        k: v for k, v in given.items() if k not in changing
    }
    one, two = (AdapterState.open(tmp_path / name / "own") for name in ("one", "two"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    said = made.refused("--adapter", handed, "--run", "second")
    assert "--run is 'second'" in said and "is of run first" in said


def test_an_unknown_run_is_one_error_that_lists_the_known_runs(bank):
    made = bank()
    assert "there are: none" in made.refused("--run", "first")
    (made.directory / "state" / "released" / "damaged").mkdir(parents=True)
    assert "released/damaged cannot be read. For" in made.refused("--run", "first")
    (made.directory / "state" / "released" / "damaged").rmdir()
    for run, name in (("a1", "first"), ("a2", "second"), ("a3", "second")):
        made.receive(made.release(run=run, name=name))
    said = made.refused("--run", "third")
    assert "--run is 'third'" in said and "there are: first, second, second." in said
    assert "give the identity of one: a2, a3" in made.refused("--run", "second")


def test_what_this_user_may_not_enter_is_one_line(bank, monkeypatch):
    made = bank()
    made.receive(made.release())

    def closed(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", closed)
        assert "run the command as the user" in made.refused("--run", "first")
    monkeypatch.setattr(Path, "is_symlink", closed)
    assert "cannot be read: Permission denied" in made.refused("--run", "first")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "0"), "--steps is 0; it must be at least 1"),
        (("--adapter", "none"), "release.json cannot be read"),
        (("--out", "."), "exists; give a path that does not exist"),
        (("--out", "none/there"), "is no directory that can be written to"),
    ],
)
def test_bad_arguments_of_the_command_are_one_line_and_nothing_is_written(bank, arguments, words):
    made = bank()
    made.receive(made.release())
    run = () if "--adapter" in arguments else ("--run", "first")
    assert words in made.refused(*run, *arguments)


def test_a_damaged_adapter_or_another_base_is_one_line(bank):
    made = bank()
    made.receive(made.release())
    place = made.directory / "state" / "released" / RUN
    about = json.loads((place / "release.json").read_text())
    (place / "release.json").write_text(json.dumps({**about, "base": "0" * 64}))
    assert "is not the base that run first was trained on" in made.refused("--run", "first")
    (place / "release.json").write_text(json.dumps(about))
    (place / "adapter_model.safetensors").write_bytes(b"no")
    assert "cannot be read" in made.refused("--run", "first")


def test_a_run_that_the_settings_forbid_is_refused(bank):
    made = bank()
    made.receive(made.release())
    made.set(models=["another"])
    assert "model-not-allowed" in made.refused("--run", "first")


def test_a_run_of_instruction_tuning_is_refused_by_its_task(bank):
    made = bank(**{"model.task": "sft", "data.labels": "[]", "home.method": "none"})
    made.set(labels=[])
    found = SimpleNamespace(name="first", config=made.config.flat())
    with pytest.raises(InputError, match="run first has the task sft; models at home"):
        home_command._config(made.load(), home_command.Choices(run="first"), found)


def test_a_strategy_with_residuals_gives_models_too(bank):
    whole = {"federation.server-optimizer": "none", "federation.server-learning-rate": 1.0}
    made = bank(**{"federation.strategy": "exact", **whole})
    work = made.work()
    layers = work.start.layers()
    torch.manual_seed(1)
    residual = {}
    for path, layer in layers.items():
        pair = (
            0.05 * torch.randn(3, layer.a.shape[1]),
            0.05 * torch.randn(layer.b.shape[0], 3),
        )
        residual |= layer._replace(residual=pair).named(path)
    made.receive(made.release(adapter=made.adapter().updated(residual)))
    result = made.result("--run", "first")
    assert result["own"]["accuracy"] > 0


def test_predict_evaluate_and_merge_take_the_directory_and_use_the_own_model(bank):
    made = bank()
    made.receive(made.release())
    made.result("--run", "first")
    place, texts = made.directory / "state" / "home" / "first", ["a stolen card", "my loan"]
    found = finished_run.predict(place, texts)["answers"]
    work, adapter = made.work(), AdapterState.open(place / "own")
    adapter.load_into(work.model)
    encoded = work.task.encode(texts, [LABELS[0]] * 2, work.labels)
    said, _ = work.task.predict(work.model, data.shard_of(encoded), work.labels)
    assert [one["answer"] for one in found] == list(said)
    assert finished_run.predict(place, texts, "Alpha", own_model=True)["answers"] == found
    with pytest.raises(InputError, match="an institution's own model and no run"):
        Result(place)
    measured = finished_run.evaluate(place, str(made.directory / "test.csv"))
    assert (
        measured["accuracy"] == json.loads((place / "result.json").read_text())["own"]["accuracy"]
    )
    with pytest.raises(InputError, match=r"institution is Beta, but .* own model of Alpha; leave"):
        finished_run.predict(place, texts, "Beta")
    finished_run.merge(place, made.directory / "merged")
    assert "must not leave" in " ".join(
        (made.directory / "merged" / "README.md").read_text().split()
    )
    known = json.loads((made.directory / "merged" / "merged.json").read_text())
    sources = {one["source"] for one in known if not one["private"]}
    assert ONE_INSTITUTION in sources  # no deployed run takes it for a base of public records
