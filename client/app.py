"""The Flower ClientApp of an institution: unpack, call, pack. Errors leave as codes."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import cohort, config_policy, measurement, settings
from client.institution import Institution
from client.secure_party import SecureParty
from fedlora.config.config import from_context
from fedlora.config.sections import check_gpu, check_threads
from fedlora.errors import InputError, RecordError, Refusal, place
from fedlora.secure.secure_aggregation import (
    ListOrder,
    SecureMessage,
    SharesOrder,
    Terms,
    UnmaskOrder,
)
from fedlora.wire import wire
from fedlora.wire.messages import EvaluateOrder, Evaluation

log = logging.getLogger("fedlora.client")
_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")
_Order = TypeVar("_Order", bound=SecureMessage)


class InstitutionApp(ClientApp):
    """A ClientApp that can also answer for several institutions of a simulation at once."""

    def together(self, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        """Reply to orders to train, to each as if it had arrived alone.

        Args:
            calls: Messages with their contexts (`client.cohort`).
        """
        unpack = wire.OrderReader().unpack
        replies: dict[int, RecordDict] = {}
        plays: dict[int, tuple[Institution, cohort.Play]] = {}
        for number, (message, context) in enumerate(calls):
            institution = None
            try:
                wire.check_version(message.content)
                institution = _institution(context)
                plays[number] = institution, institution.play(unpack(message.content))
            except Exception as error:
                replies[number] = _refusal(error, institution)
        outcomes = cohort.answer([play for _, play in plays.values()])
        for (number, (institution, _)), outcome in zip(plays.items(), outcomes, strict=True):
            failed = isinstance(outcome, Exception)
            replies[number] = (
                _refusal(outcome, institution) if failed else wire.pack_update(outcome)
            )
        return [Message(replies[i], reply_to=message) for i, (message, _) in enumerate(calls)]


app = InstitutionApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say who this institution is, and whether the whole run fits its budget."""
    return _reply(message, context, wire.unpack_query, Institution.hello, wire.pack_hello)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """Make and sign the keys of a run with secure aggregation."""
    return _reply(message, context, _reads(Terms), Institution.secure_keys, wire.pack_secure)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """Check all keys of a run, and seal shares of this institution's secrets."""
    return _secure(message, context, SharesOrder, SecureParty.shares)


@app.query("list")
def sign_list(message: Message, context: Context) -> Message:
    """Sign the survivors of a round."""
    return _secure(message, context, ListOrder, SecureParty.sign_list)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Close a round in the ledger, and reveal shares for its sum."""
    return _secure(message, context, UnmaskOrder, SecureParty.unmask)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _reply(message, context, wire.unpack_order, Institution.answer, wire.pack_update)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the institution's own adapter, in a simulation."""
    return _reply(
        message, context, wire.unpack_evaluate, measurement.evaluate, wire.pack_evaluation
    )


@app.evaluate("home")
def home(message: Message, context: Context) -> Message:
    """Compare the models that the institution trains at home, in a simulation."""

    def compare(institution: Institution, order: EvaluateOrder) -> Evaluation:
        return measurement.compare_at_home(institution, measurement.released(institution, order))

    return _reply(message, context, wire.unpack_evaluate, compare, wire.pack_evaluation)


@app.evaluate("released")
def released(message: Message, context: Context) -> Message:
    """Store the adapter that the run released."""
    return _reply(message, context, wire.unpack_release, Institution.receive, wire.pack_evaluation)


def _secure(
    message: Message,
    context: Context,
    kind: type[_Order],
    call: Callable[[SecureParty, _Order], SecureMessage],
) -> Message:
    """The reply to a message of secure aggregation."""

    def answer(institution: Institution, order: _Order) -> SecureMessage:
        return call(institution.secure_role().party(), order)

    return _reply(message, context, _reads(kind), answer, wire.pack_secure)


def _reads(kind: type[_Order]) -> Callable[[RecordDict], _Order]:
    return functools.partial(wire.unpack_secure, kind)


def _reply(
    message: Message,
    context: Context,
    unpack: Callable[[RecordDict], _Question],
    call: Callable[[Institution, _Question], _Answer],
    pack: Callable[[_Answer], RecordDict],
) -> Message:
    """The reply to a message: the institution's answer, or a refusal."""
    institution = None
    try:
        wire.check_version(message.content)  # first: another version may have other keys and fields
        institution = _institution(context)
        content = pack(call(institution, unpack(message.content)))
    except Exception as error:
        content = _refusal(error, institution)
    return Message(content, reply_to=message)


def _institution(context: Context) -> Institution:
    """This machine's institution, with the configuration as it follows it.

    In a simulation the experimenter plays every institution, and the server's configuration decides
    everything. Elsewhere the institution's own settings name its records, its ledger and the runs
    that it accepts. Only this machine decides that it simulates: it has no settings, and the node's
    configuration, which fedlora's engines make, says so.

    Raises:
        InputError: For a configuration or settings that cannot be followed on this machine.
        Refusal: ``no-settings`` for a machine without settings; other codes for runs that the
            settings forbid.
    """
    path = context.node_config.get("settings")
    if path is None and context.node_config.get("simulation") is True:
        config = from_context(context.run_config, context.run_id)
        if config.deployed:
            raise Refusal("bad-configuration", "data.source is institutions in a simulation")
        check_threads("engine.threads", config.engine.threads)
        if config.engine.gpus:  # Ray counts the cards that torch may be unable to use
            check_gpu(f"engine.gpus is {config.engine.gpus:g}", "0")
        return Institution.locate(config, int(context.node_config["partition-id"]))
    if not isinstance(path, str):
        raise Refusal(
            "no-settings",
            "this institution has no settings of its own: give its SuperNode --node-config with "
            'settings="/path/to/institution.toml"',
        )
    own = settings.load(path)
    return Institution.deployed(own, config_policy.apply(own, context.run_config))


def _refusal(error: Exception, institution: Institution | None) -> RecordDict:
    """The code of an error, as a reply; the error's text goes to this institution's log.

    Args:
        error: The error that ended the call.
        institution: The institution; None if the error came before it was known.
    """
    name = "this institution" if institution is None else institution.name
    simulated = institution is not None and institution.simulated
    if isinstance(error, Refusal):
        log.warning("%s refused: %s", name, error)
        # one code for all guards: which guard tripped may depend on a record
        return wire.pack_refusal("guard" if error.code.startswith("guard-") else error.code)
    if isinstance(error, InputError):
        words = str(error) if institution is None or simulated else settings.in_own_keys(str(error))
        if isinstance(error, RecordError) and not simulated:
            words = f"{place(error)}; `fedlora deploy check` shows the record"
        log.error("%s cannot follow this configuration: %s", name, words)
        return wire.pack_refusal("bad-configuration")
    # Where the records are real, an error's text, which may quote one, stays out of the log.
    log.error("%s failed: %s", name, place(error), exc_info=error if simulated else None)
    return wire.pack_refusal("failed")
