"""A reply that cannot be read concerns its node and no other."""

import pytest
from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedlora.errors import Refusal
from fedlora.wire import wire
from fedlora.wire.messages import Query
from server.exchange import exchange
from server.replies import content
from simulation.engines.grid import identify
from simulation.engines.inline import InlineGrid


class RaisingGrid(InlineGrid):
    """Raises for every request whose ids include that of a message to node 2."""

    def __init__(self, nodes, error):
        app = ClientApp()

        @app.query()
        def hello(message, context):
            return Message(message.content, reply_to=message)

        super().__init__(app, nodes, {})
        self._error, self.requests = error, []

    def pull_messages(self, message_ids):
        asked = [self._waiting[i].metadata.dst_node_id for i in message_ids if i in self._waiting]
        self.requests.append(asked)
        if 2 in asked:
            raise self._error
        return super().pull_messages(message_ids)


@pytest.fixture
def orders():
    identify()
    query = wire.pack_query(Query(run="a1", first=True, participations=1))
    return [Message(query, node, MessageType.QUERY) for node in (1, 2, 3)]


def test_orders_that_a_restarting_superlink_lost_are_pushed_again(orders):
    grid, push = RaisingGrid(1, ValueError()), InlineGrid.push_messages
    lost = iter([ObjectPushError("id", 1, "session")])

    def push_messages(messages):
        for error in lost:
            raise error
        return push(grid, messages)

    grid.push_messages = push_messages
    replies = dict(exchange(grid, orders[:1], 5.0))
    assert not replies[1].has_error()


@pytest.mark.parametrize("error", [ValueError("torn"), KeyError("x"), AttributeError("y")])
def test_a_reply_that_the_grid_cannot_read_is_refused_and_the_others_arrive(orders, error):
    grid = RaisingGrid(3, error)
    replies = dict(exchange(grid, orders, 5.0))
    assert set(replies) == {1, 2, 3}
    for node in (1, 3):
        assert not replies[node].has_error()
    with pytest.raises(Refusal, match="malformed-message"):
        content(replies[2])
    assert grid.requests == [[1, 2, 3], [1], [2], [3]]
