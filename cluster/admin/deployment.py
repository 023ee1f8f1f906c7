"""The Serve deployment of the admin port. Nothing that serves requests waits for it."""

from __future__ import annotations

import asyncio
from typing import Final

from ray import serve

from shoal.cluster.admin.cluster import ServeCluster
from shoal.cluster.admin.history import History
from shoal.cluster.admin.proxy import Proxy
from shoal.cluster.admin.routes import build_admin_app
from shoal.cluster.admin.server import HttpServer, bind
from shoal.cluster.config import AdminSettings, HttpSettings, LogSettings, base_url
from shoal.cluster.logs import log_to_serve

GATEWAY_NAME: Final = "gateway"  # of the deployment that it asks
BIND_TIMEOUT_S: Final = 30.0  # longer than the one before it may take to leave


class Admin:
    """The process that listens on the admin port. Constructing it waits until the port is its own."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, admin: AdminSettings, port: int, http: HttpSettings, logs: LogSettings
    ) -> None:
        """`http`: where the gateways' proxy of this node listens. Raises PortTakenError."""
        log_to_serve(logs.format, logs.level)
        cluster = ServeCluster(GATEWAY_NAME, serve.get_replica_context().app_name)
        history = History(cluster)
        self._proxy = Proxy(
            base_url(http.host, http.port), max_body_bytes=http.max_body_bytes, body_timeout_s=http.body_timeout
        )
        self._server = HttpServer(build_admin_app(cluster, history, self._proxy, hosts=admin.hosts))
        self._server.start(await bind(admin.host, port, timeout_s=BIND_TIMEOUT_S))
        self._sampling = asyncio.create_task(history.run())

    def check_health(self) -> None:
        """Raises RuntimeError where nothing listens any more; Serve then starts another one."""
        self._server.check()

    async def __del__(self) -> None:
        # Serve awaits this on every orderly way out of a running replica.
        self._sampling.cancel()
        await self._server.close()
        await self._proxy.close()
