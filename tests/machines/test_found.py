"""Programs that once failed, as the machines printed them. Each names what was wrong."""

from client.ledger import Ledger
from tests.machines.budgets import within
from tests.machines.test_institution_machine import InstitutionMachine
from tests.machines.test_server_machine import PRIVACY, ServerMachine


def test_two_answers_to_one_order_that_arrive_at_once_end_no_run(server_world):
    """KeyError in the exchange: the second was looked up after the first was taken off."""
    state = within(ServerMachine, **server_world)()
    state.begin(changes={})
    state.a_server(dies=None, script=[([(1, "honest"), (1, "no adapter")], "honest", 3)], then={})
    state.teardown()


def test_a_record_of_no_steps_with_negative_noise_ends_no_run(server_world):
    """InputError in the statement after the last round, and again at every resume."""
    what = PRIVACY.index({"steps": 0, "noise_multiplier": -1.0})
    state = within(ServerMachine, **server_world)()
    state.begin(changes={})
    state.a_server(
        dies=None, script=[([], "honest", 1)] * 2 + [([(1, what)], "honest", 1)], then={}
    )
    state.teardown()


def test_an_order_for_a_part_that_there_is_not_is_refused_before_it_is_paid(institution_world):
    """The round was charged, then refused when training began."""
    state = within(InstitutionMachine, **institution_world)()
    state.begin()
    sent = state.order(run="a1", round=1, participations=3, allowed=0, adapter="as it is")
    state.forged_order(sent=sent, forged=("order", {"parts": ("Z",), "round": 2}))
    with Ledger.open(state.ledger) as ledger:
        assert [entry["round"] for entry in ledger.show()["entries"]] == [1]
    state.teardown()
