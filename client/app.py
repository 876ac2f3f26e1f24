"""The Flower ClientApp of an institution: unpack, call, pack. Errors leave as codes."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedlora
from client import institution, server_keys, settings
from fedlora import config as configuration
from fedlora import trainable, wire
from fedlora.adapters import AdapterState
from fedlora.errors import InputError, RecordError, Refusal, place

log = logging.getLogger("fedlora.client")
T = TypeVar("T")


class InstitutionApp(ClientApp):
    """A ClientApp that can also answer for several institutions of a simulation at once."""

    def together(self, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The replies to train messages, each the very one that it would get by itself.

        Institutions that follow equal orders under DP train in shared passes: each has its own
        records, ledger, sampling, clipped sum and noise, and what is shared is the base model's
        arithmetic. The others, and those that train DoRA in several steps, train one by one.
        """
        replies: list[RecordDict | None] = []
        charged: dict[int, institution.ChargedRound] = {}

        def begin(
            config: configuration.RunConfig, content: RecordDict, who: institution.Institution
        ) -> RecordDict | None:
            order = wire.unpack_order(content)
            if not config.privacy.enabled or order.kept or not institution.can_share(config):
                return _train(config, content, who)
            if any(other.institution == who for other in charged.values()):
                return None  # the same order twice: the second gets the answer to the first
            started = institution.charge(who, institution.accept(who, order, config), config)
            if isinstance(started, wire.ClientUpdate):
                return wire.pack_update(started)
            ledgers.enter_context(started.ledger)
            charged[len(replies)] = started
            return None

        with contextlib.ExitStack() as ledgers:
            for message, context in calls:
                replies.append(_guarded(message, context, begin))
            for number, adapter in _trained(charged).items():
                message, context = calls[number]

                def end(
                    *_: object, number: int = number, adapter: AdapterState = adapter
                ) -> RecordDict:
                    return wire.pack_update(institution.release(charged[number], adapter))

                replies[number] = _guarded(message, context, end)
        # What is left trains by itself; if it was charged, as the same release under the same key.
        return [
            Message(
                _guarded(message, context, _train) if reply is None else reply, reply_to=message
            )
            for reply, (message, context) in zip(replies, calls, strict=True)
        ]


app = InstitutionApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this institution is, and whether the whole run fits its budget."""
    return Message(_guarded(message, context, _hello), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    return Message(_guarded(message, context, _train), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Metrics of the institution's own adapter, in a simulation."""
    return Message(_guarded(message, context, _evaluate), reply_to=message)


def _hello(
    config: configuration.RunConfig, content: RecordDict, who: institution.Institution
) -> RecordDict:
    query = wire.unpack_query(content)
    fits = True
    if config.privacy.enabled:
        shard = trainable.records(config).train(who.index)
        plan = institution.budget(config, shard.num_units, query.participations)
        with institution.open_ledger(
            who, config, shard, create=query.first and who.simulated
        ) as ledger:
            institution.check_limits(who, ledger, plan)
            fits = query.run in ledger.runs() or institution.fits(ledger, plan)
    return wire.pack_hello(
        wire.Hello(
            institution=who.name,
            version=fedlora.__version__,
            fits=fits,
            rank=who.rank,
        )
    )


def _train(
    config: configuration.RunConfig, content: RecordDict, who: institution.Institution
) -> RecordDict:
    order = wire.unpack_order(content)
    with _threads(config.engine.threads):
        return wire.pack_update(institution.answer(who, order, config))


def _evaluate(
    config: configuration.RunConfig, content: RecordDict, who: institution.Institution
) -> RecordDict:
    order = wire.unpack_evaluate(content)
    with _threads(config.engine.threads):
        return wire.pack_evaluation(institution.evaluate(who, order, config))


def _trained(charged: Mapping[int, institution.ChargedRound]) -> dict[int, AdapterState]:
    """The trained adapters of the rounds that could be trained, those of equal orders at once."""
    cohorts: dict[str, list[int]] = {}
    for number, started in charged.items():
        cohorts.setdefault(started.digest, []).append(number)
    found: dict[int, AdapterState] = {}
    for numbers in cohorts.values():
        cohort = [charged[number] for number in numbers]
        try:
            with _threads(cohort[0].config.engine.threads):
                trained = institution.train_charged(cohort)
        except Exception:  # whose it is shows when each trains by itself
            log.exception("training %d institutions together failed", len(cohort))
            continue
        found |= zip(numbers, trained, strict=True)
    return found


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums in floating point follow the number of threads: it is the same in every engine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _situation(context: Context) -> tuple[configuration.RunConfig, institution.Institution]:
    """The configuration as this institution follows it, and who it is.

    In a simulation the experimenter is every institution, and the server's configuration decides
    everything. Elsewhere an institution's own settings decide where its records and its ledger are
    and what it takes part in. What tells a simulation is local: our inline engine says so to the
    app, and Ray, ours or Flower's, runs it in one of its workers.

    Raises:
        InputError: For a configuration or settings that cannot be followed on this machine.
        Refusal: ``no-settings`` for a machine that has none, and what the settings forbid.
    """
    ray = sys.modules.get("ray")
    if context.node_config.get("simulation") is True or (ray and ray.is_initialized()):
        config = configuration.from_context(context.run_config, context.run_id)
        if config.deployed:
            raise Refusal("bad-configuration", "data.source is institutions in a simulation")
        configuration.check_threads("engine.threads", config.engine.threads)
        index = int(context.node_config.get("partition-id", -1))
        return config, institution.locate(config, index)
    path = context.node_config.get("settings")
    if not isinstance(path, str):
        raise Refusal(
            "no-settings",
            "this institution has no settings of its own: give its SuperNode --node-config with "
            'settings="/path/to/institution.toml"',
        )
    own = settings.load(path)
    config = server_keys.apply(own, context.run_config)
    return config, institution.deployed(own, config)


def _guarded(
    message: Message,
    context: Context,
    work: Callable[[configuration.RunConfig, RecordDict, institution.Institution], T],
) -> T | RecordDict:
    """What ``work`` gives; an error leaves as a code, its text goes to this institution's log."""
    who, simulated = "this institution", False
    try:
        config, situated = _situation(context)
        who, simulated = situated.name, situated.simulated
        return work(config, message.content, situated)
    except Refusal as refusal:
        log.warning("%s refused: %s", who, refusal)
        # one code for all guards: which one tripped may depend on a record
        code = "guard" if refusal.code.startswith("guard-") else refusal.code
        return wire.pack_refusal(code)
    except InputError as error:
        quotes = isinstance(error, RecordError) and not simulated
        log.error(
            "%s cannot follow this configuration: %s",
            who,
            f"{place(error)}; `fedlora deploy check` shows the record" if quotes else error,
        )
        return wire.pack_refusal("bad-configuration")
    except Exception as error:
        # Where the records are real, an error's text, which may quote one, stays out of the log.
        log.error("%s failed: %s", who, place(error), exc_info=error if simulated else None)
        return wire.pack_refusal("failed")
