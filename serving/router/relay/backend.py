"""Engines behind the router: a request is relayed to one of them, and to another when that one is lost."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import Receive

from serving.cluster.directory import ReplicaRecord
from serving.errors import EngineError, NoReplicaError, ReplicaConnectError, ServingError
from serving.http.disconnects import ClientPresence
from serving.http.reply import Reply
from serving.router.accounting.metering import RequestContext
from serving.router.relay.replica_relay import Relay
from serving.router.scheduling.dispatcher import Slot

logger = logging.getLogger(__name__)


class Gateway:
    """Sends requests that have been let in to engine replicas, over the network."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def start(self) -> None:
        """Must run inside the event loop that answers."""
        await self._relay.start()

    async def close(self) -> None:
        await self._relay.close()

    async def fetch_usage(self, replica: ReplicaRecord, request_id: str) -> dict[str, Any] | None:
        """What the replica's engine counted for a request; None when it cannot tell."""
        return await self._relay.fetch_usage(replica, request_id)

    async def answer(self, context: RequestContext, slot: Slot, reply: Reply, receive: Receive) -> None:
        """Try replicas until one has begun to answer; nothing reaches the client before that.

        Raises:
            ServingError: it failed. When the reply has begun it is a broken stream without its end.
            ClientGoneError: the client has left, and the engine has been told.
        """
        async with ClientPresence(receive):
            while True:
                try:
                    return await self._try(context, slot, reply)
                except ServingError as error:
                    has_another = slot.fail(error) and error.is_retryable
                    if reply.has_begun or not (has_another or await slot.wait_for_replacement(error)):
                        raise
                    logger.warning("replica %s failed %s: %s", context.tried[-1].replica_id, context.request_id, error)

    async def _try(self, context: RequestContext, slot: Slot, reply: Reply) -> None:
        request, notes = context.understood()
        context.tried.append(slot.replica)
        context.uncounted.append(slot.replica)
        context.on_try(context)
        notes.image_modes = slot.modes
        try:
            if context.trace is None:
                await self._relay.relay(request, context.request_id, slot.replica, notes, reply)
            else:
                with context.trace.trying(slot.replica.replica_id) as headers:
                    await self._relay.relay(request, context.request_id, slot.replica, notes, reply, headers)
        except (ReplicaConnectError, EngineError, NoReplicaError):
            context.uncounted.pop()  # it refused, or was never asked; one that failed may have worked for it before
            raise
        slot.succeed()
