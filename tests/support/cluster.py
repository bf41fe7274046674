"""A real Slurm cluster on one machine: a login node and two compute nodes, each in namespaces of its own.

Every machine has its own network, host name, mounts, IPC and processes; they are joined by a bridge that lives in the
login node's network namespace, so that the host's network and ``/etc`` stay as they are. File systems are the host's,
shared by all machines, as on a cluster. Nodes have no way to the internet, and claim processors, memory and GPUs (null
devices) that the host need not have.

All processes live in the login node's PID namespace, whose first process the kernel ends when the test process dies,
however it dies. What can be left then is a folder, which the next start removes.

For tests of faults::

    cluster.cut("node2")        # nothing gets to node2 or from it; its processes go on
    cluster.heal("node2")       # connects it again; returns when Slurm may start jobs there
    cluster.power_off("node2")  # all its processes are gone at once, without a word to anybody
    cluster.power_on("node2")   # boots it; returns when Slurm may start jobs there

Slurm takes a node that does not answer for down after about 15 s, ends what is left of its jobs, and requeues them.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support.slurm_conf import ADDRESSES, CGROUP_CONF, GPUS, NODES, gres_conf, hosts, slurm_conf

HERE = Path(__file__).resolve().parent
PREFIX = "dora-slurm-"
RUN = Path("/run")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare", "setpriv", "mknod")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
FOREIGN = ("SLURM_", "SBATCH_", "DORA_", "ACCELERATE_", "SWEEP_")  # of the user's own cluster; they are not passed on
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}


class UnavailableError(RuntimeError):
    """This machine cannot have such a cluster; the message says why."""


def check_available() -> None:
    """Raise :class:`UnavailableError` unless the cluster can be started."""
    if os.geteuid() != 0:
        raise UnavailableError("a Slurm cluster in namespaces needs root")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} not found: apt-get install --no-install-recommends {PACKAGES}")
    kinds = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run(
        ["unshare", *kinds, "sh", "-c", "mount -t sysfs sysfs /sys && ip link add switch type bridge"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    if tried.returncode:
        raise UnavailableError(f"this machine refuses namespaces to root: {tried.stderr.strip()}")


def remove_stale() -> None:
    """Remove the folders of clusters whose test process was killed."""
    for folder in RUN.glob(f"{PREFIX}*"):
        pid, _, rest = folder.name.removeprefix(PREFIX).partition("-")
        if _started(pid) != rest.partition("-")[0]:
            shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """The cluster, as seen by a user on its login node."""

    def __init__(self) -> None:
        # Named after its owner from the first moment on, so that no other test process takes it for left behind.
        owner = str(os.getpid())
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{owner}-{_started(owner)}-", dir=RUN))
        self._machines: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring it up; returns when Slurm may start jobs on all nodes."""
        for name in ("etc", "log", "state", "self", "machines"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "hosts").write_text(hosts())
        (self.folder / "etc" / "slurm.conf").write_text(slurm_conf(self.folder))
        (self.folder / "etc" / "gres.conf").write_text(gres_conf(self.folder))
        (self.folder / "etc" / "cgroup.conf").write_text(CGROUP_CONF)
        self._boot("login")
        # As a node counts its GPUs by their device files, they must be devices; no process opens them.
        self.run("sh", "-c", f"for n in $(seq 0 {GPUS - 1}); do mknod {self.folder}/gpu$n c 1 3; done")
        wait_for(lambda: self._in("login", "ip", "address", "show", "switch").returncode == 0, 10, "the bridge")
        for node in NODES:
            self.power_on(node, wait=False)
        for node in NODES:
            self._wait_usable(node)

    def stop(self) -> None:
        """End everything, jobs too, and remove the folder."""
        if "login" in self._machines:
            os.kill(self._first_process("login"), signal.SIGKILL)
        for process in self._machines.values():
            process.wait(timeout=20)
        shutil.rmtree(self.folder)

    def run(self, *command: str, cwd: Path = HERE, timeout: float = 60, **environment: str) -> str:
        """Standard output of a command on the login node; it must succeed."""
        finished = self._in("login", *command, cwd=cwd, timeout=timeout, environment=environment)
        assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}{finished.stdout}"
        return finished.stdout

    def sbatch(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit; the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What Slurm knows of a job, or of every element of an array: the fields of ``scontrol show job``."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines if line]

    def wait(self, job: str, timeout: float) -> list[dict[str, str]]:
        """Wait until a job, or every element of an array, has ended for good."""
        wait_for(
            lambda: all(found["JobState"] in ENDED for found in self.jobs(job)),
            timeout,
            lambda: f"the end of job {job}: {[found['JobState'] for found in self.jobs(job)]}",
        )
        return self.jobs(job)

    def cut(self, node: str) -> None:
        """Pull the network cable of a node; what runs there goes on."""
        self.run("ip", "link", "set", f"port-{node}", "down")

    def heal(self, node: str) -> None:
        """Plug the cable in again; returns when Slurm may start jobs there.

        Nothing is started there before the processes of lost jobs are gone: slurmctld's order to end them would hit
        those of the same job started again.
        """
        self.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=cut")
        self.run("ip", "link", "set", f"port-{node}", "up")
        # slurmctld asks a node that is down once in a while only; slurmd reports at once when it reads its file again.
        self.on(node, "sh", "-c", f"kill -HUP $(cat {self.folder}/self/slurmd.pid)")
        wait_for(lambda: "DOWN" not in self._state(node), 60, f"{node}'s report")
        steps = ("sh", "-c", "grep -lsx slurmstepd /proc/[0-9]*/comm")
        wait_for(lambda: self._in(node, *steps).returncode != 0, 60, f"the end of the steps on {node}")
        self.run("scontrol", "update", f"nodename={node}", "state=resume")
        self._wait_usable(node)

    def power_off(self, node: str) -> None:
        """End all processes of a node at once, its network first."""
        self.cut(node)
        os.kill(self._first_process(node), signal.SIGKILL)
        self._machines.pop(node).wait(timeout=20)

    def power_on(self, node: str, wait: bool = True) -> None:
        """Boot a node; returns when Slurm may start jobs there, unless it is told not to wait."""
        self._in("login", "ip", "link", "delete", f"port-{node}")  # one may be left of a node that lost its power
        self._boot(node)
        inside = self._pid_seen_from_login(node)
        peer = ("type", "veth", "peer", "name", "cable", "netns", inside)
        self.run("ip", "link", "add", f"port-{node}", "master", "switch", *peer)
        self.run("ip", "link", "set", f"port-{node}", "up")
        if wait:
            self._wait_usable(node)

    def on(self, node: str, *command: str) -> str:
        """Standard output of a command on a compute node; it must succeed."""
        finished = self._in(node, *command)
        assert finished.returncode == 0, f"{' '.join(command)} on {node}: {finished.stderr}{finished.stdout}"
        return finished.stdout

    def logs(self) -> str:
        """The ends of the logs of Slurm and of the machines."""
        paths = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def _boot(self, name: str) -> None:
        shutil.rmtree(self.folder / "machines" / name, ignore_errors=True)
        first = ["bash", str(HERE / "machine.sh"), name, str(self.folder), ADDRESSES[name]]
        kinds = ["--net", "--uts", "--ipc", "--mount", "--propagation", "private", "--pid", "--mount-proc"]
        inside = ["unshare", *kinds, "--fork", "--kill-child", *first]
        # The login node ends with this process; the others live in its PID namespace and end with it.
        command = ["setpriv", "--pdeathsig", "KILL", *inside] if name == "login" else [*self._enter("login"), *inside]
        system = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        with open(self.folder / "log" / f"console-{name}", "ab") as console:
            self._machines[name] = subprocess.Popen(
                command, env=system, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        wait_for(lambda: self._first_process(name) and self._hostname(name) == name, 10, f"{name} to boot")

    def _first_process(self, name: str) -> int:
        """PID, as the host sees it, of process 1 of a machine; 0 if there is none yet."""
        pid = self._machines[name].pid
        for _ in range(1 if name == "login" else 2):  # unshare's child; for a node unshare is nsenter's child
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if not children:
                return 0
            pid = int(children[0])
        return pid

    def _pid_seen_from_login(self, node: str) -> str:
        status = Path(f"/proc/{self._first_process(node)}/status").read_text()
        return next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-2]

    def _hostname(self, name: str) -> str:
        return self._in(name, "hostname").stdout.strip()

    def _enter(self, name: str) -> list[str]:
        kinds = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "--target", str(self._first_process(name)), *kinds]

    def _in(
        self,
        name: str,
        *command: str,
        cwd: Path = HERE,
        timeout: float = 60,
        environment: dict[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        settings = {**inherited, "SLURM_CONF": f"{self.folder}/etc/slurm.conf", **(environment or {})}
        entered = [*self._enter(name), f"--wd={cwd}", "--", *command]
        return subprocess.run(entered, env=settings, capture_output=True, text=True, timeout=timeout)

    def _state(self, node: str) -> str:
        return self.run("sinfo", "--noheader", "--nodes", node, "--partition", "main", "--format", "%T").strip().upper()

    def _wait_usable(self, node: str) -> None:
        usable = {"IDLE", "MIXED", "ALLOCATED", "COMPLETING"}
        # Until slurmd is up, slurmctld may believe what it knew of the node before it lost its power.
        daemon = self.folder / "machines" / node / "slurmd.pid"
        wait_for(
            lambda: daemon.exists() and self._in("login", "sinfo").returncode == 0 and self._state(node) in usable,
            60,
            self.logs,
        )


def _started(pid: str) -> str:
    """When a process was started, in ticks since boot, or '' if there is none: a PID alone may be another's by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def wait_for(condition: Callable[[], object], timeout: float, what: str | Callable[[], str]) -> None:
    """Ask until it holds; on time-out fail, saying what was waited for."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.1)
