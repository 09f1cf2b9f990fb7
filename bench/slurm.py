#!/usr/bin/env python3
"""Run slurm/submit.sh on a Slurm of this machine's own, disturb its jobs, and compare with plain commands.

    python3 bench/slurm.py

Debian's Slurm is unpacked into a temporary folder: nothing is installed, and a Slurm that is there is left
alone. Of the training jobs one is killed, one is warned by hand and one by the time limit; a job that makes
maps is warned, too. The warned ones go on by themselves, and submit.sh, typed again, submits what is open.
Meanwhile the same commands run without Slurm, neither folds nor scans dealt out. All files of models/ and
heatmaps/ are compared, as bench/torture.py compares them, the records but for the name of the run's folder.
Status 1 where one differs, or a job did not end as it should.
"""

import contextlib
import getpass
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import pandas as pd

SUITE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SUITE))

import torture  # noqa: E402

import simulate  # noqa: E402
import utils  # noqa: E402
from internals import nifti  # noqa: E402

PACKAGES = ["munge", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins"]
VOXEL = 2.06  # mm, the coarsest grid that modelB2 takes
EDGE = 24  # voxels, of the block of the brain that maps are compared in
FOLDS, PARTS, METHODS = 4, 2, "LRP Gradient"
TRAIN = "--model modelB2 --epochs 4 --batch 3 --lr 1e-3 --cache none --workers 0"
MAPS, CHECKS = "--save-subjects", "--scans-per-fold 1 --repeats 1 --orders"
COMPARE = "--smooth 0 --rank-smooth 0"
PATIENCE = 600  # seconds for which anything is waited for
SETTINGS = f"""
PARTITION=bench ACCOUNT='' GPUS=0 CPUS=1 MEMORY=900M TIME=30 LEAD=90
SETUP='PATH="{Path(sys.executable).parent}:$PATH"'
FOLDS={FOLDS} PARTS={PARTS} METHODS='{METHODS}' TRAIN='{TRAIN}' MAPS='{MAPS}' CHECKS='{CHECKS}'
COMPARE='{COMPARE}'
"""
# A requeued job waits until its credential has expired: here five seconds, the least; else two minutes.
# Slurm looks for jobs that may begin every three seconds, else every minute.
CONFIGURATION = """
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={top}/munge.socket,cred_expire=5
PluginDir={plugins}
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=3,bf_interval=3,batch_sched_delay=0
SlurmdParameters=config_overrides
MinJobAge=3600
NodeName=here NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PartitionName=bench Nodes=here
"""
# How every job should end, and how often it went back to the queue.
FIRST = {"train 0": "COMPLETED 0", "train 1": "FAILED 0", "train 2": "COMPLETED 1", "train 3": "COMPLETED 1"}
FIRST |= {"maps 0-7": "CANCELLED 0", "rest": "CANCELLED 0"}
SECOND = {"train 1": "COMPLETED 0", **{f"maps {i}": f"COMPLETED {int(i == 3)}" for i in range(8)}}
SECOND |= {"rest": "COMPLETED 0"}

Found = TypeVar("Found")


# A Slurm of one machine ----------------------------------------------------------------------------


def run(*words: object, status: int = 0, **options: Any) -> str:
    """Run a command to its end; returns what it printed; Failure, with its last line, at another status."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    if done.returncode != status:
        last = " ".join((done.stdout + done.stderr).splitlines()[-1:])
        raise utils.Failure(f"{words[0]}: status {done.returncode}, expected {status}: {last}")
    return done.stdout


def unpack(folder: Path) -> Path:
    """Download Slurm's packages and what this machine lacks of those that they need; returns their `usr`."""
    ask = ["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES]
    try:
        if subprocess.run(ask, capture_output=True).returncode:
            run("apt-get", "update")  # a fresh machine knows of no packages
        lacking = re.findall(r"^Inst (\S+)", run(*ask), re.M)
        run("apt-get", "download", *{*PACKAGES, *lacking}, cwd=folder)
    except FileNotFoundError as problem:
        raise utils.Failure("apt-get: not found; this test needs Debian's packages of Slurm") from problem
    for package in folder.glob("*.deb"):
        run("dpkg-deb", "--extract", package, folder)
    return folder / "usr"


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Slurm:
    """A Slurm whose files lie in one folder. All its processes, jobs too, are known by their SLURM_CONF."""

    def __init__(self, top: Path, usr: Path) -> None:
        (library,) = usr.glob("lib/*/slurm-wlm")
        facts = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "plugins": library}
        self.programs, self.top = usr / "sbin", top
        self.daemons: list[subprocess.Popen] = []
        configuration = top / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(top=top, ports=free_ports(2), **facts))
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        search = {"PATH": f"{usr}/bin:{mine['PATH']}", "LD_LIBRARY_PATH": f"{library.parent}:{library}"}
        self.environment = {**mine, **search, "SLURM_CONF": str(configuration)}

    def __call__(self, *words: object, **options: Any) -> str:
        """Run a command of Slurm's, or one that calls such."""
        return run(*words, env=self.environment, **options)

    def start(self) -> None:
        """Start the three daemons, and wait until the node takes jobs."""
        key = self.top / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for folder in ("state", "spool"):
            (self.top / folder).mkdir()
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        places = [f"--{name}={self.top / file}" for name, file in files.items()]
        self._start("munged", "--foreground", "--force", *places)
        wait_until("munged listens", (self.top / "munge.socket").exists)
        self._start("slurmctld-wlm", "-D")
        self._start("slurmd-wlm", "-D", "-d", str(self.programs / "slurmstepd-wlm"))
        wait_until("the node is idle", lambda: "idle" in self("sinfo", "--noheader", "--format=%t"))

    def _start(self, program: str, *options: str) -> None:
        words, silence = [str(self.programs / program), *options], subprocess.DEVNULL
        self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=silence, stderr=silence))

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """The number and the words of every process that lives with this configuration."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name), (folder / "cmdline").read_text().split("\0")

    def stop(self) -> None:
        """Kill every process of it."""
        while found := list(self.processes()):
            for pid, _ in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self.daemons:
            daemon.wait()

    def at_work(self, *words: str) -> int:
        """The process of a job that has these words in its command line and holds a lock; 0 for none."""
        wanted = " ".join(words)
        for pid, found in self.processes():
            if wanted in " ".join(found) and torture.holds_a_lock(pid):
                return pid
        return 0

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm says of every job that it had, arrays task by task."""
        lines = self("scontrol", "show", "job", "--oneliner").splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


@contextlib.contextmanager
def running_slurm(top: Path) -> Iterator[Slurm]:
    """A Slurm that lives as long as this context, however that ends."""
    packages = top / "packages"
    packages.mkdir()
    slurm = Slurm(top, unpack(packages))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def wait_until(what: str, true: Callable[[], Found], pause: float = 0.2) -> Found:
    """Ask until the answer is true, and return it; Failure where it stays false."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if answer := true():
            return answer
        time.sleep(pause)
    raise utils.Failure(f"waited {PATIENCE} seconds in vain until {what}")


# The disturbed run ---------------------------------------------------------------------------------


def simulate_cohort(folder: Path) -> None:
    """Twelve scans, their truth, and a block around some of it as the mask: a whole brain takes minutes."""
    simulate.main(["--outpath", str(folder), "--subjects", "12", "--voxel", str(VOXEL)])
    image = nib.Nifti1Image.from_filename(folder / "mask.nii.gz")
    brain, places = np.asarray(image.dataobj), np.argwhere(nifti.load_map(folder / "truth.nii.gz"))
    block = tuple(slice(place - EDGE // 2, place + EDGE // 2) for place in places[len(places) // 2])
    narrow = np.zeros_like(brain)
    narrow[block] = brain[block]
    nib.save(nib.Nifti1Image(narrow, image.affine, image.header), folder / "mask.nii.gz")


def submit(slurm: Slurm, cohort: Path) -> dict[str, str]:
    """Type submit.sh; returns the numbers of the jobs by their names, those of the last stages at least."""
    files = [cohort / name for name in ("data.csv", "truth.nii.gz", "mask.nii.gz")]
    printed = slurm(SUITE / "slurm" / "submit.sh", *files)
    print(printed, end="", flush=True)
    numbers = re.findall(r": job (\d+)$", printed, re.M)
    return dict(zip(["rest", "maps", "train"], reversed(numbers), strict=False))


def restarts(slurm: Slurm, task: str) -> int:
    """How often a task of an array went back to the queue."""
    return int(re.findall(r" Restarts=(\d+)", slurm("scontrol", "show", "job", "--oneliner", task))[0])


def is_warned(pid: int) -> bool:
    """Whether a signal waits for a process that is stopped."""
    return not re.search(r"^ShdPnd:\s0+$", Path(f"/proc/{pid}/status").read_text(), re.M)


def warn(slurm: Slurm, task: str) -> None:
    """Have a job warned, and wait until it is back in the queue."""
    words = ["scancel", "--signal=USR1", "--batch", task]
    with subprocess.Popen(words, env=slurm.environment, stderr=subprocess.DEVNULL) as scancel:
        wait_until(f"{task} is back in the queue", lambda: restarts(slurm, task))
        scancel.kill()  # while other tasks of the array wait, it sends the signal again every few seconds


def disturb_training(slurm: Slurm, job: str) -> None:
    """Kill fold 1, warn fold 2, and have fold 3 come near its time limit in the middle of an epoch."""
    for fold in range(1, FOLDS):
        wait_until(f"fold {fold} has finished an epoch", Path("models", f"progress_f{fold}.pth").exists)
    workers = {fold: slurm.at_work("--run-folds", str(fold)) for fold in range(1, FOLDS)}
    if not all(workers.values()):
        raise utils.Failure("a fold was trained before it could be disturbed")
    os.kill(workers[3], signal.SIGSTOP)  # an epoch that lasts until the warning comes
    slurm("scontrol", "update", f"JobId={job}_3", "TimeLimit=1")
    os.kill(workers[1], signal.SIGKILL)
    warn(slurm, f"{job}_2")
    wait_until("fold 3 is warned", lambda: is_warned(workers[3]))
    os.kill(workers[3], signal.SIGCONT)
    wait_until("fold 3 is back in the queue", lambda: restarts(slurm, f"{job}_3"))
    slurm("scontrol", "update", f"JobId={job}_3", "TimeLimit=30")


def disturb_maps(slurm: Slurm, job: str) -> None:
    """Warn the job of fold 1's second part while it is at work."""
    wait_until("maps are made", lambda: slurm.at_work("--run-folds", "1", "--part", "2/2"))
    warn(slurm, f"{job}_{PARTS + 1}")


def ends(slurm: Slurm, numbers: dict[str, str]) -> pd.DataFrame:
    """Wait until the queue is empty; how all of these jobs ended, a row each."""
    wait_until("the queue is empty", lambda: not slurm("squeue", "--noheader"), pause=1)
    rows = {}
    for job in slurm.jobs():
        number, task = job.get("ArrayJobId", job["JobId"]), job.get("ArrayTaskId", "")
        if number in numbers.values():
            name = f"{job['JobName'].removeprefix('cnn-')} {task}".strip()
            rows[name] = number, job["JobState"], int(job["Restarts"]), job["ExitCode"]
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["job", "state", "requeues", "status"]
    ).sort_index()


def as_expected(table: pd.DataFrame, expected: dict[str, str]) -> bool:
    """Print how jobs ended, and whether that is as it should be."""
    found = (table["state"] + " " + table["requeues"].astype(str)).to_dict()
    print(table.to_string(), flush=True)
    if found != expected:
        logs = "\n".join(f"{file}:\n{file.read_text()}" for file in sorted(Path("logs").iterdir()))
        print(f"expected {expected}\n{logs}")
    return found == expected


# The same without Slurm, and the comparison --------------------------------------------------------


def start_plainly(slurm: Slurm, cohort: Path, folder: Path) -> subprocess.Popen:
    """Start the commands one after the other, neither folds nor scans dealt out; they end with `slurm`."""
    masked, cpu = ["--mask", cohort / "mask.nii.gz"], ["--device", "cpu"]
    commands: list[list[Any]] = [
        ["train_cv.py", "--path", cohort / "data.csv", "--fold", FOLDS, *TRAIN.split(), *cpu],
        ["heatmap.py", "--method", *METHODS.split(), *MAPS.split(), *cpu],
        ["svm.py", *masked],
        ["ttest.py", *masked],
        ["sanity.py", *masked, *CHECKS.split(), *cpu],
        ["overlap.py", *masked, "--reference", cohort / "truth.nii.gz", *COMPARE.split()],
    ]
    script = "\n".join(shlex.join(torture.command(*words)) for words in commands)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", "-ec", script], cwd=folder, env=slurm.environment, **pipes)


@utils.command("nothing of it is kept")
def main(argv: list[str] | None = None) -> int:
    """Run the recipe on a disturbed Slurm, and plainly; print how the jobs ended and what differs."""
    utils.ArgumentParser(__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        cohort, disturbed, plain = top / "cohort", top / "a run", top / "plain run"
        simulate_cohort(cohort)
        disturbed.mkdir()
        plain.mkdir()
        with running_slurm(top) as slurm, contextlib.chdir(disturbed):
            Path("site.sh").write_text(SETTINGS)
            undisturbed = start_plainly(slurm, cohort, plain)  # while jobs wait, a core is free
            numbers = submit(slurm, cohort)
            disturb_training(slurm, numbers["train"])
            good = as_expected(ends(slurm, numbers), FIRST)
            numbers = submit(slurm, cohort)
            disturb_maps(slurm, numbers["maps"])
            good &= as_expected(ends(slurm, numbers), SECOND)
            torture.finish(undisturbed)
        for record in plain.rglob("*.json"):  # they name the folder of the networks
            record.write_text(record.read_text().replace(str(plain), str(disturbed)))
        folders = ["models", "heatmaps"]
        rows = [torture.differences(disturbed / folder, plain / folder) for folder in folders]
    table = pd.DataFrame(rows, index=folders, columns=["files compared", "differences"])
    print(table.to_string())
    return int(not good or table["differences"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
