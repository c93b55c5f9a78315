"""The same groups of cells as Ray tasks, on one machine or on a cluster: `run_cells(..., executor=RayExecutor(...))`.

Every task checks that its node sees the store and has the same versions, then does what a local worker does. Ray restarts a task
whose node or process dies; the store's locks prevent that anything is computed twice meanwhile. The cluster may grow and shrink
while cells run.
"""

import functools
import importlib
import os
import platform
import signal
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.checks import optional
from lofit_lens.errors import InputError
from lofit_lens.experiments.executors.attempt import Outcome, Outcomes, Work, attempt
from lofit_lens.experiments.executors.process import prepare_process
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.store.store import Store

SAME = ("lofit-lens", "torch", "transformer-lens", "transformers")  # packages whose versions must agree on all nodes
RETRIES = 3  # restarts of a task whose node or process died


class RayExecutor:
    """Groups of cells as Ray tasks; see `runner.Executor`.

    Args:
        store: as in `run_cells`; its folder must be on a file system that all nodes see under the same path.
        work: as in `run_cells`; a function of a module that all nodes can import.
        context: as in `run_cells`.
        address: address of the cluster, `"auto"` or `"HOST:PORT"`; None = that of RAY_ADDRESS, else Ray is started on this
            machine for this run. If this process has already initialized Ray, that instance is used.
        cpus: CPUs per group.
        gpus: GPUs per group; at 0.5 two groups share one. None = 1 if the cluster has GPUs, else 0. A group without a GPU is
            computed on the CPU.

    Raises:
        InputError: Ray is not installed or cannot be reached, or no node has room for a cell.
    """

    def __init__(
        self, store: Store, work: Work, context: Any, *, address: str | None = None, cpus: float = 1.0, gpus: float | None = None
    ) -> None:  # fmt: skip
        if cpus < 0 or (gpus or 0) < 0 or cpus + (gpus or 0) == 0:
            raise InputError(f"a cell needs some CPU or GPU; got cpus={cpus}, gpus={gpus}")
        self._ray = _ray()
        self._running: dict[Any, Group] = {}  # by the task's reference
        self._interrupted = False
        self._ours = not self._ray.is_initialized()
        self._probe = store.root / f".seen-by-{uuid.uuid4().hex[:12]}"
        if self._ours:
            _connect(self._ray, address)
        try:
            there = self._ray.cluster_resources()
            if gpus is None:
                gpus = 1.0 if there.get("GPU", 0) >= 1 else 0.0
            self._wants = {"CPU": cpus, "GPU": gpus}
            if not self._room():
                raise InputError(
                    f"no node of this cluster has room for a cell ({cpus:g} CPUs, {gpus:g} GPUs); it has {there}. Ask for less "
                    "per cell, or add a node"
                )
            io.write_text(self._probe, "every node of the cluster must see this file\n")
            setting = (store, work, context, str(self._probe), _versions())
            try:
                self._shared = [self._ray.put(setting)]  # in a list, so that a task gets the reference and not a copy
            except TypeError as e:
                raise InputError(f"the work or its context cannot be sent to other nodes ({_first_line(e)})") from e
            # A process sees all GPUs of its node and uses the one that it is assigned, which may differ for the next cell.
            seen = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}} if gpus else None
            self._task = self._ray.remote(_compute).options(
                num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, runtime_env=seen
            )
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> int:
        """Groups that the cluster has room for now; at least one, which waits for a node to come back. 0 after Ray is closed."""
        return max(1, self._room()) if self._ray.is_initialized() else 0

    def submit(self, group: Group) -> None:
        """Submit a group to the cluster."""
        self._running[self._task.remote(self._shared, group)] = group

    def wait(self, timeout: float) -> list[Outcomes]:
        """Outcomes that arrived within `timeout` seconds.

        Raises:
            InputError: a node (named) does not see the store, has other versions, or cannot run this library.
        """
        ready, _ = self._ray.wait(list(self._running), timeout=timeout)
        return [self._outcomes(ref, self._running.pop(ref)) for ref in ready]

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in every task."""
        self._interrupted = True
        for ref in self._running:
            self._ray.cancel(ref, force=False)

    def close(self) -> None:
        """Kill tasks in progress; shut Ray down, or leave the cluster, if this executor started it."""
        self._probe.unlink(missing_ok=True)
        if self._ray.is_initialized():
            for ref in self._running:
                self._ray.cancel(ref, force=True)
            if self._ours:
                self._ray.shutdown()
        self._running.clear()

    def _outcomes(self, ref: Any, group: Group) -> Outcomes:
        try:
            found = self._ray.get(ref)
        except self._ray.exceptions.RayError as e:
            if self._interrupted:
                return tuple(Outcome(cell.name, "stopped") for cell in group.cells)
            if isinstance(e, self._ray.exceptions.RayTaskError):  # not an error of the work, which would be an outcome
                why = e.cause or e
                if isinstance(why, InputError):
                    raise InputError(str(why)) from e
                raise InputError(f"a node cannot run this library; install it on every node. It said:\n{e}") from e
            return tuple(Outcome(cell.name, "failed", f"{type(e).__name__}: {_first_line(e)}") for cell in group.cells)
        return found

    def _room(self) -> int:
        """Number of groups at a time, over all nodes."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        wants = [(kind, amount) for kind, amount in self._wants.items() if amount]
        return sum(int(min(has.get(kind, 0.0) / amount + 1e-9 for kind, amount in wants)) for has in nodes)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences advice about a future default
    return optional("ray", "Ray", "ray")


def _connect(ray: Any, address: str | None) -> None:
    """Join a cluster, or start one on this machine that is reachable only through loopback."""
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    there = address or os.environ.get("RAY_ADDRESS")
    if there in (None, "local"):
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        _check_reachable(there)
        options["address"] = there
    try:
        ray.init(**options)
    except Exception as e:
        where = f"the Ray cluster at {there}" if there else "Ray on this machine"
        raise InputError(
            f"cannot reach or start {where}: {_first_line(e)}; start one with `ray start --head` and give its HOST:PORT, or "
            "omit the address"
        ) from e


def _check_reachable(address: str) -> None:
    """Fail at once if nothing listens; Ray itself would try for a minute and then end the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        if "://" in address or not host:
            raise ValueError("not of the form HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as e:
        raise InputError(
            f"no Ray cluster at {address} ({e}); give 'auto' or the HOST:PORT that `ray start --head` printed"
        ) from e


def _versions() -> dict[str, str]:
    """Versions that must agree; builds of the same version (+cpu, +cu128) may differ."""
    found = io.environment()
    return {name: found.get(name, "none").split("+")[0] for name in SAME}


def _first_line(e: BaseException) -> str:
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(e).__name__


# ------------------------------------------------------------------------------------------------ on the node


def _compute(shared: list[Any], group: Group) -> Outcomes:
    """Run one task; it raises only errors of its node, since errors of the work are outcomes."""
    ray = importlib.import_module("ray")
    store, work, context, probe, versions = _opened(shared[0])
    _check_node(probe, versions)
    device = _device(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray ignores SIGINT if it was started in the background
    return attempt(store, group, work, context, device, whole_process=True)


def _device(given: Sequence[Any], visible: str | None) -> str:
    """The first GPU that Ray assigns to a task, by its index among those that the process sees; the CPU if there is none."""
    if not given:
        return "cpu"
    places = [name.strip() for name in visible.split(",")] if visible else []
    first = str(given[0])
    return f"cuda:{places.index(first) if first in places else first}"


@functools.lru_cache(maxsize=1)
def _opened(ref: Any) -> Any:
    """Read what all tasks share, once per process."""
    prepare_process()
    return importlib.import_module("ray").get(ref)


def _check_node(probe: str, versions: dict[str, str]) -> None:
    """Raise InputError, with the node's name, if it has other versions or does not see the store."""
    here, node = _versions(), f"node {platform.node()}"
    other = [f"{name} {here[name]} instead of {versions[name]}" for name in versions if here[name] != versions[name]]
    if other:
        raise InputError(f"{node} has {', '.join(other)}; install the same versions on every node")
    if not Path(probe).is_file():
        raise InputError(
            f"{node} does not see the store {Path(probe).parent}; put the store on a file system that all nodes share under "
            "one path"
        )
