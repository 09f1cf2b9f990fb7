"""utils.py: errors, options, devices, seeds, whole files, folders and pictures."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cohorts import AFFINE, contents, only_error

import utils

SHAPE = (4, 5, 6)
ROOT = Path(__file__).resolve().parents[1]


# Errors and options ------------------------------------------------------------------------------


def test_command_turns_a_mistake_into_one_line(capsys):
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        raise utils.InputError("--batch 0:\n  expected   more")

    assert main([]) == 2
    captured = capsys.readouterr()
    assert only_error(captured.err) == "error: --batch 0: expected more\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n b\t  c", "a b c"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff", "\\udcff"),
        ("süß 脳 {0} %s", "süß 脳 {0} %s"),
    ],
)
def test_what_is_shown_is_harmless(text, line):
    assert utils.printable(text) == line


def test_what_is_shown_is_not_endless():
    assert len(utils.printable("x" * 10**6)) < 2 * utils.LONGEST


def test_naming_puts_a_name_in_front_of_a_mistake_alone():
    with pytest.raises(utils.InputError, match=r"^--mask a: is empty$"), utils.naming("--mask a"):
        raise utils.InputError("is empty")
    with pytest.raises(ValueError, match=r"^a fault$"), utils.naming("--mask a"):
        raise ValueError("a fault")


def test_command_passes_the_status_and_the_arguments():
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        """Say how many."""
        return len(argv or [])

    assert main(["a", "b", "c"]) == 3
    assert main() == 0
    assert main.__doc__ == "Say how many."


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        (utils.Failure("disk\nfull"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted: all is saved\n"),
    ],
)
def test_command_says_in_one_line_how_it_ended(capsys, end, status, line):
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        raise end

    assert main([]) == status
    assert capsys.readouterr().err == line


def test_command_unwinds_on_sigterm_and_restores_its_handler(capsys, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        with utils.whole_file(tmp_path / "a.csv") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert main([]) == 143
    assert capsys.readouterr().err == "interrupted: all is saved\n"
    assert contents(tmp_path) == {}
    assert signal.getsignal(signal.SIGTERM) is before


def test_memory_that_does_not_suffice_is_a_failure():
    with (
        pytest.raises(utils.Failure, match=r"a batch: out of memory; lower --batch"),
        utils.enough("a batch", "lower --batch"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(utils.Failure, match=r"a kernel: out of memory"), utils.enough("a kernel", "mask"):
        np.empty(2**60, np.uint8)
    with pytest.raises(RuntimeError, match="inconsistent"), utils.enough("a batch", "lower --batch"):
        torch.ones(2) @ torch.ones(3)


def test_random_states_come_back():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    utils.seed_everything(1)
    states = utils.random_states(torch.device("cpu"))
    first = draw()
    assert draw() != first
    utils.restore_random(states, torch.device("cpu"))
    assert draw() == first


@pytest.mark.parametrize("fault", [ValueError, KeyError, RuntimeError, FileNotFoundError])
def test_command_lets_a_fault_of_the_program_through(fault):
    @utils.command("all is saved")
    def main(argv: list[str] | None = None) -> int:
        raise fault("deep inside")

    with pytest.raises(fault, match="deep inside"):
        main([])


def test_parser_mistakes_are_input_errors():
    parser = utils.ArgumentParser("A command.")
    parser.add_argument("--batch", type=utils.number(int, at_least=1), default=5, help="scans at once")
    for argv, word in [(["--batch", "0"], "--batch"), (["--other"], "--other"), (["--bat", "3"], "--bat")]:
        with pytest.raises(utils.InputError, match=word):
            parser.parse_args(argv)
    assert "(default: 5)" in parser.format_help()


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"kind": int}, "-3", -3),
        ({"kind": int, "at_least": 1}, "1", 1),
        ({"kind": int, "at_most": 4}, "4", 4),
        ({"kind": float, "above": 0}, "1e-4", 1e-4),
        ({"kind": float, "at_least": 0}, "0", 0.0),
        ({"kind": float, "above": 0, "below": 1}, "0.99", 0.99),
    ],
)
def test_number(options, text, expected):
    value = utils.number(**options)(text)
    assert value == expected
    assert type(value) is options["kind"]


@pytest.mark.parametrize(
    ("options", "text", "words"),
    [
        ({"kind": int, "at_least": 1}, "0", "'0' is not an integer >= 1"),
        ({"kind": int, "at_least": 1}, "1.5", "'1.5' is not an integer >= 1"),
        ({"kind": int}, "one", "'one' is not an integer"),
        ({"kind": int, "at_most": 4}, "5", "<= 4"),
        ({"kind": float, "above": 0}, "0", "'0' is not a number > 0"),
        ({"kind": float}, "nan", "'nan' is not a number"),
        ({"kind": float}, "inf", "'inf' is not a number"),
        ({"kind": float, "above": 0}, "-inf", "> 0"),
        ({"kind": float, "above": 0, "below": 1}, "1", "> 0 and < 1"),
        ({"kind": float}, "", "'' is not a number"),
    ],
)
def test_number_out_of_bounds(options, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        utils.number(**options)(text)
    assert words in str(error.value)


# Devices and seeds -------------------------------------------------------------------------------


def test_devices_that_are_there():
    assert utils.resolve_device("cpu") == torch.device("cpu")
    found = utils.resolve_device("auto").type
    if torch.cuda.is_available():
        assert found == "cuda"
        assert utils.resolve_device("0") == torch.device("cuda:0")
    else:
        assert found == ("mps" if torch.backends.mps.is_available() else "cpu")


# the first GPU that is not there; "0" on a machine without any
BEYOND = str(torch.cuda.device_count())


@pytest.mark.parametrize(
    "name",
    [BEYOND, f"cuda:{BEYOND}", "99", "cuda:99", "tpu", "gpu", "meta", "xpu", "-1", "cuda:x", "", "1.0"],
)
def test_devices_that_are_not(name):
    with pytest.raises(utils.InputError) as error:
        utils.resolve_device(name)
    assert f"--device {name}:" in str(error.value)


def test_seed_sets_every_generator():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    utils.seed_everything(7)
    first = draw()
    utils.seed_everything(8)
    second = draw()
    utils.seed_everything(7)
    assert draw() == first
    assert all(a != b for a, b in zip(first, second, strict=True))
    utils.seed_everything(2**32 + 7)  # a seed beyond numpy's is no reason to fail
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


# Whole files -------------------------------------------------------------------------------------


def test_whole_file_appears_at_the_end_only(tmp_path):
    path = tmp_path / "map.nii.gz"
    with utils.whole_file(path) as partial:
        assert partial.parent == path.parent
        assert partial.name.endswith(".nii.gz")
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert contents(tmp_path) == {"map.nii.gz": b"whole"}


def test_whole_file_is_cleaned_after_an_error_and_the_old_one_survives(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def write_half() -> None:
        with utils.whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert contents(tmp_path) == {"a.csv": b"old"}
    with utils.whole_file(path) as partial:
        partial.write_text("new")
    assert contents(tmp_path) == {"a.csv": b"new"}


def test_whole_file_that_nobody_writes_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was written"), utils.whole_file(tmp_path / "a.csv"):
        pass
    assert contents(tmp_path) == {}


def test_whole_file_in_a_folder_that_is_gone_is_a_failure(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()

    def write() -> None:
        with utils.whole_file(folder / "a.csv") as partial:
            shutil.rmtree(folder)
            partial.write_text("whole")

    for _ in range(2):  # while it is written, and before
        with pytest.raises(utils.Failure, match=r"a\.csv: cannot be written \(No such file"):
            write()
    assert not folder.exists()


# A process that says "held" once it holds a lock, forks a child that lives on as data loaders do, and waits.
HOLDER = """
import os, sys, time, utils
from pathlib import Path
with utils.locked(Path(sys.argv[1])):
    if os.fork() == 0:
        sys.stdout.close()
        time.sleep(60)
    print("held", os.getpid(), flush=True)
    time.sleep(60)
"""


def test_lock_is_released_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith(b"held")
        with pytest.raises(BlockingIOError), utils.locked(lock, wait=False):
            pass
        holder.kill()
        holder.wait()
        with utils.locked(lock, wait=False):  # though the child is still there
            assert lock.exists()
        os.killpg(holder.pid, signal.SIGKILL)
    assert not lock.exists()


def test_locks_of_many_processes_exclude_each_other(tmp_path):
    """Four processes add one to a number, a hundred times each; the lock file comes and goes meanwhile."""
    number, lock = tmp_path / "number", tmp_path / "lock"
    number.write_text("0")
    program = "import sys, utils; from pathlib import Path; number, lock = map(Path, sys.argv[1:])\n"
    program += "for _ in range(100):\n with utils.locked(lock):\n"
    program += "  number.write_text(str(int(number.read_text()) + 1))"
    command = [sys.executable, "-c", program, str(number), str(lock)]
    others = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [other.wait() for other in others] == [0] * 4
    assert number.read_text() == "400"
    assert not lock.exists()


def test_leftovers_go_unless_they_are_being_written(tmp_path):
    for name in (".partial-a.csv", ".partial-b.csv", ".partial-other.txt", "a.csv"):
        (tmp_path / name).write_text("half")
    with utils.locked(tmp_path / ".partial-b.csv"):
        utils.remove_leftovers(tmp_path, ["*.csv"])
        assert set(contents(tmp_path)) == {".partial-b.csv", ".partial-other.txt", "a.csv"}


def test_tensors_have_the_same_bytes_under_any_name(tmp_path):
    record = {"weight": torch.arange(5.0), "epoch": 3}
    for name in ("a.pth", "b.pth"):
        utils.write_tensors(record, tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert torch.load(tmp_path / "a.pth", weights_only=True)["epoch"] == 3


def test_csv_keeps_every_digit(tmp_path):
    values = np.random.default_rng(0).random(50) * 10.0 ** np.arange(-25, 25)
    utils.write_csv(pd.DataFrame({"path": ["a, b"] * 50, "value": values}), tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_bytes().decode().split("\n")
    assert lines[0] == "path,value"
    assert [float(line.rsplit(",", 1)[1]) for line in lines[1:-1]] == values.tolist()


def test_json_round_trip(tmp_path):
    record = {"a": [1.0 / 3, None], "b": {"é": "x"}}
    utils.write_json(record, tmp_path / "run.json")
    assert utils.read_json(tmp_path / "run.json") == record


DEEP, LONG = b'{"a":' * 10**5, b'{"a": ' + b"1" * 5000 + b"}"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", DEEP, LONG])
def test_json_errors(tmp_path, content):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(utils.InputError, match=r"run\.json.*JSON"):
        utils.read_json(path)


def test_json_of_no_sensible_size(tmp_path):
    (tmp_path / "run.json").write_text("{}" + " " * utils.RECORD_SIZE)
    with pytest.raises(utils.InputError, match=r"run\.json: is no record of a run"):
        utils.read_json(tmp_path / "run.json")


def test_recorded():
    assert utils.recorded({"k": 3}, "k", int, lambda k: k > 2) == 3
    assert utils.recorded({"k": 0.5}, "k", (int, float)) == 0.5
    for record in ({}, {"k": True}, {"k": "3"}, {"k": None}, {"k": 2}, {"k": [3] * 10**6}, [], None, "k"):
        with pytest.raises(utils.InputError, match=r"^is damaged: 'k' is .{1,60}$"):
            utils.recorded(record, "k", int, lambda k: k > 2)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # the example of FIPS 180-2, appendix B.1
    assert utils.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_versions_name_python_and_every_package():
    found = utils.versions()
    assert set(found) == {"python", *utils.PACKAGES}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


# Folders -----------------------------------------------------------------------------------------

PATTERNS = ["run.json", "map_f*.nii.gz", "subjects/f*.nii.gz"]
IDENTITY = {"model": "modelB2", "folds": 2}


def fill(folder: Path, record: dict | None) -> None:
    """A folder with a map, a map in a subfolder, and two files of somebody else."""
    for name in ("map_f0.nii.gz", "subjects/f0_a.nii.gz", "notes.txt", "subjects/other.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))


def check(folder: Path, overwrite: bool = False) -> dict:
    return utils.check_folder(folder, "run.json", IDENTITY, PATTERNS, overwrite)


def test_new_folder_is_free_and_is_not_created_by_the_check(tmp_path):
    assert check(tmp_path / "a" / "b") == {}
    assert contents(tmp_path) == {}
    assert not (tmp_path / "a").exists()


def test_folder_with_other_files_is_free(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert check(tmp_path) == {}


def test_folder_of_the_same_run_is_gone_on_with(tmp_path):
    fill(tmp_path, IDENTITY | {"weights": "x"})
    assert check(tmp_path) == IDENTITY | {"weights": "x"}


def test_folder_of_another_run_is_refused(tmp_path):
    fill(tmp_path, IDENTITY | {"folds": 5})
    before = contents(tmp_path)
    with pytest.raises(utils.InputError) as error:
        check(tmp_path)
    assert all(word in str(error.value) for word in ["run.json", "folds", "5", "2", "--overwrite"])
    assert "modelB2" not in str(error.value)
    assert check(tmp_path, overwrite=True) == {}
    assert contents(tmp_path) == before


def test_folder_with_results_but_no_record_is_refused(tmp_path):
    fill(tmp_path, None)
    with pytest.raises(utils.InputError, match=r"map_f0\.nii\.gz is in the way.*--overwrite"):
        check(tmp_path)
    assert check(tmp_path, overwrite=True) == {}


def test_folder_with_a_damaged_record_is_refused(tmp_path):
    fill(tmp_path, None)
    (tmp_path / "run.json").write_text('{"model": ')
    with pytest.raises(utils.InputError, match=r"run\.json"):
        check(tmp_path)


def test_outpath_that_is_or_lies_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(utils.InputError, match=r"--outpath .*file"):
            check(place)


def test_overwrite_removes_the_suites_files_only(tmp_path):
    fill(tmp_path, IDENTITY)
    utils.start_folder(tmp_path, "run.json", IDENTITY, PATTERNS, overwrite=False)
    assert len(contents(tmp_path)) == 5
    utils.start_folder(tmp_path, "run.json", IDENTITY, PATTERNS, overwrite=True)
    assert set(contents(tmp_path)) == {"notes.txt", "subjects/other.txt"}


def test_choose_folds():
    assert utils.choose_folds(None, 3) == [0, 1, 2]
    assert utils.choose_folds([2, 0, 2], 3) == [0, 2]
    assert utils.choose_folds([0], 3) == [0]
    with pytest.raises(utils.InputError, match=r"--run-folds 3.*0 to 2"):
        utils.choose_folds([0, 3], 3)


# Pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, -1e-9, -1])
def test_figure_is_a_png_whatever_the_values(tmp_path, low):
    values = np.linspace(low, 3 * abs(low), 16 * 17 * 18).reshape(16, 17, 18)
    scan = np.random.default_rng(0).random((16, 17, 18))
    utils.save_map_figure(values, scan, AFFINE, "LRP", tmp_path / "map.png")
    assert set(contents(tmp_path)) == {"map.png"}
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
