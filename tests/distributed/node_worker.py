"""A rank as a machine of its own, in a network namespace: `… PORT NAMESPACE-0 NAMESPACE-1 ARGUMENTS-OF-TIM`.

It meets the other one as `tim launch` without `--node-rank` does: torchrun's rendezvous, with our arguments. Then it runs `tim`.
"""

from __future__ import annotations

import os
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import registry
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters

from launch.cli import main
from launch.distributed.rendezvous import rendezvous_arguments, socket_environment
from tests.distributed.namespaces import ADDRESSES, enter


def meet(port: str) -> tuple[RendezvousHandler, dict[str, str]]:
    """Meet the other machine. Returns the handler, which holds the store, and what torchrun puts into the environment of a rank."""
    endpoint = f"{ADDRESSES[0]}:{port}"
    arguments = ["--nnodes=2", *rendezvous_arguments(endpoint, nnodes=2, node_rank=None), "tim"]
    config, _, _ = torchrun.config_from_args(torchrun.parse_args(arguments))
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    handler = registry.get_rendezvous_handler(parameters)
    found = handler.next_rendezvous()
    store = found.bootstrap_store_info
    assert store is not None
    print(f"machine at {config.local_addr}: rank {found.rank}, store at {store.master_addr}", flush=True)
    place = {"RANK": found.rank, "WORLD_SIZE": found.world_size, "MASTER_ADDR": store.master_addr, "MASTER_PORT": store.master_port}
    settings = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return handler, {**{name: str(value) for name, value in place.items()}, **settings, **socket_environment(endpoint, nnodes=2)}


if __name__ == "__main__":
    _, port, *namespaces = sys.argv[:4]
    enter(namespaces[int(os.environ["RANK"])])
    handler, environment = meet(port)
    os.environ.update(environment)
    sys.exit(main(sys.argv[4:]))
