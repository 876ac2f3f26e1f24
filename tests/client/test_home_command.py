"""An institution's own models after a run: its own command, on its own machine, for itself."""

import csv
import dataclasses
import json
import socket

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from typer.testing import CliRunner

from cli.main import app as cli
from client import app, config_policy, home_command, releases, settings
from client.ledger import Ledger
from client.local_parts import LocalParts
from fedlora.config.config import UNRELEASED
from fedlora.data import data
from fedlora.errors import InputError, Refusal
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.models.model_files import ONE_INSTITUTION
from fedlora.runs import finished_run
from fedlora.wire import wire
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
    assert not {"run-dir", "data.test-source"} & set(found.config)


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


def test_a_run_that_the_settings_forbid_is_refused(bank):
    made = bank()
    made.receive(made.release())
    made.set(models=["another"])
    assert "model-not-allowed" in made.refused("--run", "first")


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
