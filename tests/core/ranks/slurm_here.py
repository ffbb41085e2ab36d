"""A Slurm of one node on this machine for tests: munged, slurmctld and slurmd, ended by their own numbers."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
WAIT_S = 60

# A requeued job waits until its credential has expired; Slurm takes a time below 5 s for 120 s.
CONFIG = """\
ClusterName=medrltest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,requeue_delay=1
ReturnToService=2
KillWait=5
MinJobAge=300
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def why_not():
    """Return why Slurm cannot be started here; empty if it can."""
    if os.geteuid() != 0:
        return "the test must be root to start Slurm's daemons"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    return ""


@contextmanager
def started():
    """Start a Slurm in a scratch folder of its own, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="slm"))  # sockets need a short path
    folder.chmod(0o777)
    here = Slurm(folder)
    try:
        here.start()
        yield here
    finally:
        here.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Slurm:
    """The three daemons; `environment` lets the commands of Slurm find them.

    Args:
        folder: Scratch folder; its path must be short, because sockets lie in it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}
        self.host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(
            host=self.host,
            folder=folder,
            ctld_port=free_port(),
            slurmd_port=free_port(),
            cpus=os.cpu_count() or 1,
            memory=2000,
        )
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "slurm.conf").write_text(text)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self):
        """Start the daemons and wait until the node is idle."""
        user = pwd.getpwnam("munge")
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        for path in (munge, munge / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
        self._start(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={munge}/key", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            f"--log-file={munge}/log", user=user,
        )  # fmt: skip
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D", "-c")
        self.start_node()

    def start_node(self):
        """Start the daemon of the node."""
        self._start("slurmd", "-D", "-N", self.host)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%T") in ("idle", "mixed", "allocated"), "slurmd")

    def kill(self, name):
        """End a daemon as a crash would."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self):
        """End all jobs and the daemons that were started here."""
        self.ask("scancel", "--user=root", "--signal=KILL")
        self.ask("scancel", "--user=root")
        time.sleep(0.5)
        for name in ("slurmd", "slurmctld", "munged"):
            process = self.processes.pop(name, None)
            if process is not None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def ask(self, *command):
        """Return what a command of Slurm writes."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout.strip()

    def state(self, job):
        """Return the state of a job."""
        return self.ask("squeue", "-h", "--states=all", "-o", "%T", "-j", str(job))

    def wait_for(self, job, *states, limit_s=120):
        """Wait until a job is in one of these states, and return it."""
        deadline = time.monotonic() + limit_s
        while (found := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {found or 'gone'}, expected {states}; {self.logs()}")
            time.sleep(0.2)
        return found

    def logs(self):
        """Return the ends of the daemons' logs."""
        parts = []
        for name in ("slurmctld.log", "slurmd.log", "slurmctld.out", "slurmd.out", "munged.out"):
            path = self.folder / name
            if path.is_file():
                parts.append(f"{name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)

    def _start(self, name, *arguments, user=None):
        program = shutil.which(name)
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self.environment},
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                user=user.pw_uid if user else None,
                group=user.pw_gid if user else None,
                extra_groups=[] if user else None,
                start_new_session=True,
            )

    def _until(self, ready, name):
        deadline = time.monotonic() + WAIT_S
        while not ready():
            process = self.processes.get(name)
            if process is None or process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not start: {self.logs()}")
            time.sleep(0.2)
