"""What submit.sh asks of Slurm, and how job.sh ends, with stand-ins for Slurm's commands and python3."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sh"))
# Writes down how it was called, then prints what the file beside it says.
STAND_IN = """#!/bin/sh
exec {python} - "$0" "$@" <<'END'
import json, pathlib, sys
place = pathlib.Path(sys.argv[0 + 1])
with open("{calls}", "a") as calls:
    print(json.dumps([place.name, *sys.argv[2:]]), file=calls)
answer = place.with_suffix(".says")
if answer.exists():
    print(answer.read_text())
END
"""
SETTINGS = """
PARTITION=short ACCOUNT= GPUS=1 CPUS=3 MEMORY=5G TIME=9:00 LEAD=90 SETUP='export READY=yes'
FOLDS=2 PARTS=2 METHODS='LRP IG' TRAIN='--model modelB2' MAPS='--steps 9'
CHECKS='--repeats 1' COMPARE='--smooth 0'
"""
FINISHED = "fold 0: finished\nfold 1: open; goes on after epoch 3"


class Place:
    """A folder with a space in its name, to type submit.sh in, and stand-ins on the PATH."""

    def __init__(self, top: Path) -> None:
        self.folder, self.programs, self.calls_file = top / "my run", top / "bin", top / "calls"
        self.folder.mkdir()
        self.programs.mkdir()
        for name in ("sbatch", "squeue", "scontrol", "python3"):
            self.stand_in(name)
        self.say("sbatch", "17;cluster")
        for name in ("my data.csv", "truth.nii.gz", "mask.nii.gz"):
            (self.folder / name).write_text("")
        (self.folder / "site.sh").write_text(SETTINGS)
        self.environment = {**os.environ, "PATH": f"{self.programs}:/usr/bin:/bin"}

    def stand_in(self, name: str) -> None:
        (self.programs / name).write_text(STAND_IN.format(python=sys.executable, calls=self.calls_file))
        (self.programs / name).chmod(0o755)

    def say(self, name: str, text: str) -> None:
        (self.programs / f"{name}.says").write_text(text)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a stand-in."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [words[1:] for words in map(json.loads, lines) if words[0] == name]

    def type(self, *words: str) -> subprocess.CompletedProcess:
        line = [str(SLURM / "submit.sh"), *words]
        return subprocess.run(line, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def job(self, *lines: str, seconds: int = 60, **variables: str) -> subprocess.Popen:
        """job.sh as Slurm starts it: a copy of it, elsewhere."""
        script = shutil.copy(SLURM / "job.sh", self.programs / "slurm_script")
        words = ["bash", str(script), str(seconds), "echo ready for python", *lines]
        environment = {**self.environment, "SLURM_JOB_ID": "7", **variables}
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_the_site_is_described_before_anything_is_submitted(place):
    """The suite's own settings name no partition."""
    (place.folder / "site.sh").unlink()
    done = place.type("my data.csv")
    assert done.returncode == 2
    assert done.stderr == f"error: {SLURM / 'site.sh'}: PARTITION is not set\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected data.csv [reference.nii.gz [mask.nii.gz]], not 0 files"),
        (["my data.csv", "truth.nii.gz", "mask.nii.gz", "4"], "not 4 files"),
        (["none.csv"], "none.csv: no such file"),
        (["my data.csv", "none.nii.gz"], "none.nii.gz: no such file"),
    ],
)
def test_wrong_files(place, words, said):
    done = place.type(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"{said}\n")
    assert done.stderr.count("\n") == 1
    assert not place.calls_file.exists()


def test_no_slurm(place):
    (place.programs / "sbatch").unlink()
    done = place.type("my data.csv")
    assert (done.returncode, done.stderr) == (2, "error: sbatch: not found; submit where Slurm is\n")
    assert not place.calls_file.exists()


def test_a_folder_whose_jobs_are_queued_is_refused(place):
    place.say("squeue", f"11_0 {place.folder}\n12 /elsewhere")
    done = place.type("my data.csv")
    assert done.returncode == 2
    assert done.stderr == (
        "error: jobs of this folder are in the queue: 11_0; wait for them, or scancel them\n"
    )
    assert place.calls("sbatch") == []
    place.say("squeue", "12 /elsewhere")
    assert place.type("my data.csv").returncode == 0


def test_where_the_status_cannot_be_had_nothing_is_submitted(place):
    (place.programs / "python3").write_text("#!/bin/sh\necho 'error: a mistake' >&2; exit 2\n")
    done = place.type("my data.csv")
    assert (done.returncode, done.stderr) == (2, "error: a mistake\n")
    assert place.calls("sbatch") == []


def option(call: list[str], name: str) -> str | None:
    """The value of an option of sbatch."""
    return next((word.partition("=")[2] for word in call if word.startswith(f"--{name}=")), None)


def test_everything_is_submitted(place):
    done = place.type("my data.csv", "truth.nii.gz", "mask.nii.gz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "training, folds 0 1: job 17" in done.stdout
    train, maps, rest = place.calls("sbatch")
    assert [option(call, "array") for call in (train, maps, rest)] == ["0,1", "0,1,2,3", None]
    assert [option(call, "dependency") for call in (train, maps, rest)] == [None, *["afterok:17"] * 2]
    for call in (train, maps, rest):
        assert {"--requeue", "--open-mode=append", "--signal=B:USR1@90", "--gres=gpu:1"} <= set(call)
        assert {"--partition=short", "--cpus-per-task=3", "--mem=5G", "--time=9:00"} <= set(call)
        assert option(call, "chdir") == str(place.folder)
        assert option(call, "account") is None
        at = call.index(str(SLURM / "job.sh"))
        assert call[at + 1 : at + 3] == ["60", "export READY=yes"]
    assert [script in rest[-4 + i] for i, script in enumerate(["svm", "ttest", "sanity", "overlap"])] == [
        True
    ] * 4


def test_only_what_is_open_is_submitted(place):
    part = "{} fold {}, part {} of 2: {}"
    lines = ["LRP fold 0: finished", part.format("IG", 0, 1, "finished"), part.format("IG", 0, 2, "open")]
    lines += [part.format("LRP", 1, 1, "finished"), part.format("IG-controls", 1, 1, "finished")]
    place.say("python3", "\n".join([FINISHED, *lines]))
    done = place.type("my data.csv")
    assert (done.returncode, done.stderr) == (0, "")
    train, maps, rest = place.calls("sbatch")
    assert (option(train, "array"), option(maps, "array")) == ("1", "1,2,3")  # new weights, new maps
    assert not any("overlap.py" in word for word in rest)
    asked = [call for call in place.calls("python3") if "--status" in call]
    assert [Path(call[0]).name for call in asked] == ["train_cv.py", "heatmap.py"]
    assert not any("--device" in call for call in asked)  # there may be no GPU where one submits


def finished(*parts: str) -> str:
    """What --status prints where these are finished."""
    return "\n".join(f"{part}: finished" for part in parts)


TRAINED = finished("fold 0", "fold 1", "summary")
MAPPED = finished(
    *(f"{method} {part}" for method in ("LRP", "IG") for part in ("fold 0", "fold 1", "summary"))
)


@pytest.mark.parametrize(
    ("status", "train", "maps"),
    [
        (f"{TRAINED}\n{MAPPED}", None, None),
        (f"{TRAINED}\n{finished('LRP fold 0', 'IG fold 0')}", None, "2,3"),
        # killed when all was there but what is made of it
        (f"{finished('fold 0', 'fold 1')}\n{MAPPED}", "1", None),
        (f"{TRAINED}\n{MAPPED.replace('IG summary', '')}", None, "3"),
        (
            f"{TRAINED}\n{MAPPED.replace('IG fold 0', 'IG fold 0, part 1 of 2')}\n"
            f"{finished('IG fold 0, part 2 of 2')}",
            None,
            "1",
        ),
    ],
)
def test_what_is_finished_is_not_submitted(place, status, train, maps):
    place.say("python3", status)
    assert place.type("my data.csv").returncode == 0
    *arrays, rest = place.calls("sbatch")
    assert [option(call, "array") for call in arrays] == [tasks for tasks in (train, maps) if tasks]
    assert option(rest, "array") is None
    assert (option(rest, "dependency") is None) == (not arrays)


def test_a_site_without_gpus_and_with_accounts(place):
    (place.folder / "site.sh").write_text(SETTINGS.replace("ACCOUNT= GPUS=1", "ACCOUNT=lab GPUS=0"))
    place.type("my data.csv")
    train, _, rest = place.calls("sbatch")
    assert "--account=lab" in train
    assert option(train, "gres") is None
    assert "--device cpu " in train[-1]
    assert "--device cpu " in rest[-1]


def test_the_jobs_run_what_was_asked_for(place):
    """The command lines that submit.sh hands to sbatch, run by job.sh."""
    place.type("my data.csv", "truth.nii.gz", "mask.nii.gz")
    sent = [call[call.index(str(SLURM / "job.sh")) + 3 :] for call in place.calls("sbatch")]
    place.calls_file.unlink()
    for lines in sent:
        assert place.job(*lines, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3").wait() == 0
    suite, gpu, masked = str(SLURM.parent), ["--device", "0"], ["--mask", "mask.nii.gz"]
    train = ["--path", "my data.csv", "--fold", "2", "--model", "modelB2", *gpu, "--run-folds", "3"]
    explain = ["--method", "LRP", "IG", "--steps", "9", *gpu, "--run-folds", "1", "--part", "2/2"]
    assert place.calls("python3") == [
        [f"{suite}/train_cv.py", *train],
        [f"{suite}/heatmap.py", *explain],
        [f"{suite}/svm.py", *masked],
        [f"{suite}/ttest.py", *masked],
        [f"{suite}/sanity.py", *gpu, *masked, "--repeats", "1"],
        [f"{suite}/overlap.py", "--reference", "truth.nii.gz", *masked, "--smooth", "0"],
    ]


# How a job ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 137, 138, 143])
def test_a_job_ends_as_its_command(place, status):
    """Where that was told to stop, the job goes back to the queue."""
    place.say("squeue", "RUNNING None")
    job = place.job(
        f"bash -c 'exit {status}'", "echo the next line", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="0"
    )
    printed, errors = job.communicate()
    assert (job.returncode, errors) == (status, "")
    assert printed == "ready for python\n" + "the next line\n" * (status == 0)
    assert place.calls("scontrol") == [["requeue", "5_0"]] * (status in (138, 143))


@pytest.mark.parametrize(
    ("state", "again"),
    [("RUNNING None", True), ("COMPLETING TimeLimit", True), ("COMPLETING None", False), ("", False)],
)
def test_a_cancelled_job_stays_away(place, state, again):
    place.say("squeue", state)
    assert place.job("bash -c 'exit 143'").wait() == 143
    assert place.calls("scontrol") == [["requeue", "7"]] * again


def listener(place: Place, usr1: str, term: str = ":") -> str:
    """A command that prints "begun", and a word at every signal; it ends by itself with status 5."""
    traps = f"trap 'echo warned; {usr1}' USR1; trap 'echo told; {term}' TERM; echo begun"
    (place.folder / "listener").write_text(f"{traps}\nfor i in $(seq 40); do sleep 0.05; done; exit 5")
    return "bash listener"


def begun(job: subprocess.Popen) -> None:
    """Wait until a job's command runs."""
    assert job.stdout
    assert [job.stdout.readline() for _ in range(2)] == ["ready for python\n", "begun\n"]


@pytest.mark.parametrize(("name", "word", "status"), [("USR1", "warned", 138), ("TERM", "told", 143)])
def test_signals_are_passed_on(place, name, word, status):
    place.say("squeue", "RUNNING None")
    job = place.job(listener(place, "exit 138", "exit 143"), "echo the next line")
    begun(job)
    job.send_signal(signal.Signals[f"SIG{name}"])
    assert (*job.communicate(), job.returncode) == (f"{word}\n", "", status)
    assert place.calls("scontrol") == [["requeue", "7"]]


def test_a_command_that_takes_its_time_is_waited_for(place):
    """`wait` ends at the signal, with its status, though the command goes on."""
    job = place.job(listener(place, ":"))
    begun(job)
    job.send_signal(signal.SIGUSR1)
    assert job.stdout.readline() == "warned\n"
    job.send_signal(signal.SIGTERM)
    assert job.communicate()[0] == "told\n"
    assert job.returncode == 5
    assert place.calls("scontrol") == []


def test_a_second_warning_comes_before_the_time_is_up(place):
    place.say("squeue", "RUNNING None")
    job = place.job(listener(place, '[ "$again" ] && exit 138; again=yes'), seconds=1)
    begun(job)
    job.send_signal(signal.SIGUSR1)
    assert job.communicate()[0] == "warned\nwarned\n"
    assert job.returncode == 138
    assert place.calls("scontrol") == [["requeue", "7"]]


def test_after_a_warning_no_other_command_begins(place):
    place.say("squeue", "RUNNING None")
    job = place.job(listener(place, "exit 0"), "echo the next line")
    begun(job)
    job.send_signal(signal.SIGUSR1)
    assert job.communicate()[0] == "warned\n"
    assert job.returncode == 143
    assert place.calls("scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize("_", range(5))
def test_a_warning_at_the_very_start_of_a_command(place, _):
    """It may come before job.sh knows the command's number."""
    place.say("squeue", "RUNNING None")
    job = place.job("bash -c 'kill -s USR1 $PPID; exec sleep 9'", "echo the next line")
    assert job.communicate()[0] == "ready for python\n"
    assert job.returncode == 138
    assert place.calls("scontrol") == [["requeue", "7"]]
