"""results.py: one record, one mark of "finished", one way to go on, to refuse, to overwrite."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from cohorts import contents

from internals import storage
from internals.errors import InputError
from internals.results import Files, ResultFolder, states_of
from internals.sharing import Share

ROOT = Path(__file__).resolve().parents[1]
FILES = Files(
    record="run.json", part=["map_f{}.nii", "list_f{}.csv"], beside=["scans/f{}_*.nii"],
    progress=["progress_f{}.pth"], shared=["table.csv"], summary=["map_all.nii", "map_all.png"],
    facts=["digest", "device"],
)  # fmt: skip
IDENTITY = {"model": "modelB2", "options": {"beta": 0.5}}
OTHERS = {"notes.txt", "scans/other.txt"}  # of somebody else


def results_of(path: Path, **changes: Any) -> ResultFolder:
    return ResultFolder(**{"path": path, "files": FILES, "parts": range(3), "identity": IDENTITY} | changes)


def names_of(part: object) -> set[str]:
    return {f"map_f{part}.nii", f"list_f{part}.csv", f"scans/f{part}_a.nii"}


def write(folder: Path, names: Iterable[str], text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run(results: ResultFolder, **about: Any) -> tuple[list, bool]:
    """What every command does; returns the parts it made, and whether it made what is made of all."""
    with results.at_work(about) as missing:
        for part in missing:
            write(results.path, {f"progress_f{part}.pth", *names_of(part)})
            results.finish(part, device=f"gpu{part}")
        with results.summary() as due:
            if due:
                write(results.path, FILES.summary)
    return missing, due


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    write(folder, ["run.json"], json.dumps(record_of(folder) | changes))


@pytest.fixture
def done(tmp_path) -> Path:
    """A folder of three finished parts, and two files of somebody else."""
    run(results_of(tmp_path / "out"), csv="data.csv")
    write(tmp_path / "out", {*OTHERS, "table.csv"})
    return tmp_path / "out"


EVERYTHING = {*names_of(0), *names_of(1), *names_of(2), *FILES.summary, "run.json", "table.csv", *OTHERS}


# Afresh, and going on ----------------------------------------------------------------------------


def test_new_folder_is_made_when_work_begins(tmp_path):
    results = results_of(tmp_path / "a" / "b")
    assert not results.check(Mock(side_effect=AssertionError))
    assert not results.is_finished()
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a" / "b", OTHERS)  # a folder with other files is free
    assert not results.check()
    assert run(results, csv="data.csv") == ([0, 1, 2], True)
    assert set(contents(tmp_path / "a" / "b")) == EVERYTHING - {"table.csv"}
    about = {"csv": "data.csv", "versions": storage.package_versions(), "finished": [0, 1, 2, "summary"]} | {
        "parts": [0, 1, 2]
    }
    device = {"0": "gpu0", "1": "gpu1", "2": "gpu2"}
    assert record_of(tmp_path / "a" / "b") == IDENTITY | about | {"device": device, "digest": {}}


def test_second_call_keeps_everything(done):
    before, inspected = contents(done), []
    assert results_of(done).check(inspected.append)
    assert sorted(inspected) == [0, 1, 2]
    assert results_of(done).is_finished()
    assert run(results_of(done), csv="data.csv") == ([], False)
    assert contents(done) == before
    with pytest.raises(InputError, match="damaged"):
        results_of(done).check(Mock(side_effect=InputError("damaged")))
    edit(done, versions={"torch": "1.0"})  # what the record says beside the identity may change
    assert run(results_of(done), csv="moved.csv") == ([], False)
    found = record_of(done)
    assert (found["csv"], found["versions"]) == ("moved.csv", {"torch": "1.0"})  # of those that made it


def test_parts_may_be_made_one_call_each(tmp_path):
    for part, missing in [(1, [0, 2]), (0, [2]), (0, [2])]:
        results = results_of(tmp_path, chosen=[part])
        run(results)
        assert results.unfinished() == missing
        assert not results.is_finished()
        assert not set(FILES.summary) & set(contents(tmp_path))
    assert record_of(tmp_path)["finished"] == [0, 1]  # in order
    assert list(record_of(tmp_path)["device"]) == ["0", "1"]
    assert run(results_of(tmp_path, chosen=[2])) == ([2], True)
    assert results_of(tmp_path).is_finished()


@pytest.mark.parametrize(
    ("lost", "missing", "due"),
    [("map_f1.nii", [1], True), ("list_f2.csv", [2], True), ("map_all.png", [], True),
     ("scans/f1_a.nii", [], False), ("table.csv", [], False)],
)  # fmt: skip
def test_what_is_lost_is_made_again(done, lost, missing, due):
    (done / lost).unlink()
    assert results_of(done).is_finished() == (not due)
    with results_of(done).at_work({}) as unfinished:
        assert unfinished == missing
        gone = {lost, *(FILES.summary if missing else []), *(name for p in missing for name in names_of(p))}
        assert set(contents(done)) == EVERYTHING - gone | {f".lock-fold_{part}" for part in range(3)}
        record = record_of(done)
        assert record["finished"] == [p for p in range(3) if p not in missing] + ["summary"] * (not due)
        assert list(record["device"]) == [str(part) for part in range(3) if part not in missing]
    assert run(results_of(done)) == (missing, due)


def test_part_that_was_made_from_something_else_is_not_finished(tmp_path):
    made_from = {part: {"digest": f"sha{part}"} for part in range(3)}
    for missing in ([0, 1, 2], []):
        assert run(results_of(tmp_path, made_from=made_from)) == (missing, bool(missing))
    changed = made_from | {1: {"digest": "other"}}
    assert results_of(tmp_path, made_from=changed).unfinished() == [1]
    before = contents(tmp_path)
    assert run(results_of(tmp_path, made_from=changed, chosen=[0])) == ([], False)
    assert contents(tmp_path) == before  # part 1 is for others to judge
    assert run(results_of(tmp_path, made_from=changed)) == ([1], True)
    assert record_of(tmp_path)["digest"] == {"0": "sha0", "1": "other", "2": "sha2"}


def test_record_of_an_earlier_version(done):
    """It has no list of what is finished, nor all facts: files and the facts that are there say so."""
    record = {name: value for name, value in record_of(done).items() if name not in ("finished", "device")}
    write(done, ["run.json"], json.dumps(record | {"digest": {"0": "a", "1": "b"}}))
    made_from = {part: {"digest": "a"} for part in range(2)}
    assert results_of(done).is_finished()
    assert results_of(done, made_from=made_from).unfinished() == [1]
    (done / "map_f2.nii").unlink()
    assert run(results_of(done, made_from=made_from)) == ([1, 2], True)
    assert record_of(done)["finished"] == [0, 1, 2, "summary"]
    assert record_of(done)["device"] == {"1": "gpu1", "2": "gpu2"}


def test_what_is_interrupted_goes_on(done):
    """Half of its files and whatever a dead writer left go; finished parts have no progress to go on from."""
    (done / "map_f1.nii").unlink()
    others = {".partial-map_f2.nii"}  # may be written just now
    write(done, {"progress_f0.pth", "progress_f1.pth", "scans/f1_b.nii", "scans/.partial-f1_b.nii", *others})
    write(done, {f".partial-{name}" for name in ("map_f1.nii", "map_all.png", "run.json")})
    results = results_of(done, chosen=[0, 1])
    with results.at_work({}) as missing:
        assert missing == [1]
        there = {"progress_f1.pth", ".lock-fold_0", ".lock-fold_1", *others}
        assert set(contents(done)) == EVERYTHING - names_of(1) - set(FILES.summary) | there
        write(done, names_of(1))
        results.finish(1)
        assert not (done / "progress_f1.pth").exists()
        with contextlib.suppress(KeyboardInterrupt), results.summary() as due:
            assert due
            write(done, FILES.summary)
            raise KeyboardInterrupt
    assert not results.is_finished()  # though its files are there
    assert run(results_of(done)) == ([], True)
    assert not others & set(contents(done))


# Refused -----------------------------------------------------------------------------------------

WAY_OUT = "choose another --outpath, or --overwrite"


def refusal(results: ResultFolder) -> str:
    """What check and at_work both say; nothing is changed."""
    before, messages = contents(results.path), set()
    for ask in (results.check, results.is_finished, lambda: run(results)):
        with pytest.raises(InputError) as error:
            ask()
        messages.add(str(error.value))
    assert contents(results.path) == before
    (message,) = messages
    return message


def test_folder_of_another_run_is_refused(done):
    other = {"model": "modelB2", "options": {"beta": 1.0, "steps": 5}}
    differing = "beta (0.5 there, 1.0 now), steps (None there, 5 now)"
    message = f"{done / 'run.json'} is of another run: {differing}; {WAY_OUT}"
    assert refusal(results_of(done, identity=other)) == message
    assert not results_of(done, identity=other, overwrite=True).check()
    message = refusal(results_of(done, identity=other, overwrite=True, chosen=[1]))
    assert message.endswith(f"{WAY_OUT} without --run-folds")  # the record is of the others, too


def test_what_a_record_of_an_earlier_version_leaves_unsaid_is_implied(done):
    """An option that is new has the value that it always had."""
    now = IDENTITY | {"rule": "beta"}
    assert results_of(done, identity=now, implied={"rule": "beta"}).check()
    assert "rule (None there, beta now)" in refusal(results_of(done, identity=now))
    other = results_of(done, identity=now | {"rule": "other"}, implied={"rule": "beta"})
    assert "rule (beta there, other now)" in refusal(other)


@pytest.mark.parametrize(
    "name", ["map_f7.nii", "scans/f0_a.nii", "progress_f0.pth", "table.csv", "map_all.png"]
)
def test_results_without_a_record_are_in_the_way(tmp_path, name):
    write(tmp_path, [name])
    assert refusal(results_of(tmp_path)) == f"{tmp_path / name} is in the way; {WAY_OUT}"
    assert run(results_of(tmp_path, overwrite=True)) == ([0, 1, 2], True)


def test_damaged_record(done):
    whole = (done / "run.json").read_text()
    for damaged, words in [
        *((json.dumps(json.loads(whole) | {"finished": value}), "'finished' is") for value in (None, "all")),
        (json.dumps(json.loads(whole) | {"device": [0]}), "run.json: is damaged: 'device' is"),
        ('{"model": ', "cannot be read as JSON"), ('{"device": 5}', "is of another run"),
    ]:  # fmt: skip
        write(done, ["run.json"], damaged)
        assert words in refusal(results_of(done))
    write(done, ["run.json"], whole)
    edit(done, finished=["summary", [1], {}, 0, "0", 7, 1])  # what no part is called is ignored
    assert run(results_of(done)) == ([2], True)
    assert record_of(done)["finished"] == [0, 1, 2, "summary"]
    write(done, ["run.json"], "{")
    assert run(results_of(done, overwrite=True)) == ([0, 1, 2], True)


# Overwriting -------------------------------------------------------------------------------------


def test_overwriting_all_spares_what_is_not_the_commands(done):
    write(done, ["map_f7.nii", ".partial-map_f7.nii", ".lock-fold_7", "progress_f1.pth"])  # of a larger run
    results = results_of(done, overwrite=True, identity={"model": "other"})
    assert not results.check(Mock(side_effect=AssertionError))
    with results.at_work({}) as missing:
        assert missing == [0, 1, 2]
        assert set(contents(done)) == {*OTHERS, "run.json", *(f".lock-fold_{part}" for part in missing)}
        record = record_of(done)
        assert (record["model"], record["finished"], record["device"]) == ("other", [], {})
        assert "csv" not in record
    assert run(results) == ([0, 1, 2], True)  # once: what this call has made is not overwritten
    assert run(results) == ([], False)


@pytest.mark.parametrize("chosen", [[0], [1], [10], [1, 10]])
def test_overwriting_some_parts_spares_the_others_and_the_record(tmp_path, chosen):
    twelve, inspected = range(12), []
    run(results_of(tmp_path, parts=twelve))
    write(tmp_path, ["table.csv"])
    before = set(contents(tmp_path))
    results = results_of(tmp_path, parts=twelve, chosen=chosen, overwrite=True)
    assert results.check(inspected.append)
    assert set(inspected) == set(twelve) - set(chosen)
    assert results.unfinished() == chosen
    with results.at_work({}) as missing:
        assert missing == chosen
        gone = {name for part in chosen for name in names_of(part)} | set(FILES.summary)
        assert set(contents(tmp_path)) == before - gone | {f".lock-fold_{part}" for part in chosen}
        assert record_of(tmp_path)["finished"] == [part for part in twelve if part not in chosen]
    assert run(results) == (chosen, True)


# Several processes -------------------------------------------------------------------------------

# A process for each part, the others forked, which takes less time than starts of Python.
WORKER = """
import os, sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_results import results_of, run
folder, what, count, first, *others = sys.argv[1:]
part = next((other for other in others if os.fork() == 0), first)
results = results_of(Path(folder), parts=range(int(count)), chosen=[int(part)])
if what == "wait":
    with results.at_work({}):
        print("ready", flush=True)
        input()
os.write(1, f"{run(results)}\\n".encode())  # in one piece, beside the others'
"""


def workers(folder: Path, what: str, count: int, *parts: int) -> subprocess.Popen:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [str(folder), what, str(count), *map(str, parts)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *words], cwd=ROOT, **pipes)


def test_part_that_another_process_works_on_is_refused(tmp_path):
    run(results_of(tmp_path, parts=range(8)))
    with workers(tmp_path, "wait", 8, 7) as other:
        assert other.stdout.readline() == "ready\n"  # type: ignore[union-attr]
        before = contents(tmp_path)
        for refused in ({"chosen": [0, 7]}, {}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"^{tmp_path}: another process is at work on fold 7$"):
                run(results_of(tmp_path, parts=range(8), **refused))
        with pytest.raises(InputError, match=r"^--overwrite: another process is at work in "):
            run(results_of(tmp_path, overwrite=True))  # by a run of fewer folds, too
        assert contents(tmp_path) == before
        assert run(results_of(tmp_path, parts=range(8), chosen=[0], overwrite=True)) == ([0], True)
        other.kill()
        other.wait()
    assert (tmp_path / ".lock-fold_7").exists()  # nobody holds it
    assert run(results_of(tmp_path, overwrite=True)) == ([0, 1, 2], True)


def test_of_several_processes_one_makes_what_is_made_of_all(tmp_path):
    with workers(tmp_path, "run", 4, *range(4)) as processes:
        said = sorted(processes.communicate()[0].splitlines())  # to the end of them all
    assert [line.rpartition(", ")[0] for line in said] == [f"([{part}]" for part in range(4)]
    assert sum("True" in line for line in said) == 1
    assert record_of(tmp_path)["finished"] == [*range(4), "summary"]
    assert not list(tmp_path.glob(".*"))


# Shares ------------------------------------------------------------------------------------------

SHARED = Files(
    record="run.json", part=["map_f{}.nii"], beside=["scans/f{}_*.nii"], progress=["sums_f{}{}.npz"],
    summary=["map_all.nii"], facts=["digest", "scans"],
)  # fmt: skip


def shared(path: Path, number: int, of: int, **changes: Any) -> ResultFolder:
    return results_of(path, **{"files": SHARED, "share": Share(number, of)} | changes)


def do_share(results: ResultFolder) -> list[tuple]:
    """What a command does with its share; says which parts it did, and which of them it put together."""
    said = []
    share = results.share
    assert share is not None
    with results.at_work({}) as missing:
        for part in missing:
            write(results.path, [f"sums_f{part}{share.suffix}.npz", f"scans/f{part}_{share.number}.nii"])
            with results.finish_share(part) as facts:
                if facts is not None:
                    write(results.path, [f"map_f{part}.nii"])
                    facts["scans"] = 7
                said.append((part, facts is not None))
        with results.summary() as due:
            if due:
                write(results.path, SHARED.summary)
    return said


def test_the_last_share_puts_the_part_together(tmp_path):
    assert do_share(shared(tmp_path, 2, 3)) == [(0, False), (1, False), (2, False)]
    assert do_share(shared(tmp_path, 1, 3, chosen=[0, 2])) == [(0, False), (2, False)]
    before = contents(tmp_path)
    assert do_share(shared(tmp_path, 2, 3)) == [(0, False), (1, False), (2, False)]  # done before
    assert contents(tmp_path) == before
    assert do_share(shared(tmp_path, 3, 3)) == [(0, True), (1, False), (2, True)]
    assert not list(tmp_path.glob("sums_f[02]*"))
    assert record_of(tmp_path)["shares"] == {"1": {"of": 3, "done": [2, 3], "from": {}}}
    assert do_share(shared(tmp_path, 1, 3)) == [(1, True)]
    undivided = tmp_path / "undivided"
    assert do_share(shared(undivided, 1, 1)) == [(0, True), (1, True), (2, True)]
    assert record_of(tmp_path) == record_of(undivided)
    scans = {f"scans/f{part}_{number}.nii" for part in range(3) for number in (1, 2, 3)}
    files = {"run.json", "map_f0.nii", "map_f1.nii", "map_f2.nii", "map_all.nii"}
    assert {name for name in contents(tmp_path) if not name.startswith("undivided")} == files | scans


def test_another_division_is_refused_while_shares_are_there_or_made(tmp_path, capsys):
    do_share(shared(tmp_path, 1, 2, chosen=[0, 1]))
    with shared(tmp_path, 2, 2, chosen=[1, 2]).at_work({}):
        before = contents(tmp_path)
        for other in (shared(tmp_path, 1, 3, chosen=[1]), shared(tmp_path, 1, 1, chosen=[1])):
            with pytest.raises(InputError, match=r"another process is at work on fold 1, divided otherwise$"):
                do_share(other)
        with pytest.raises(InputError, match=r"another process is at work on fold 1$"):
            do_share(shared(tmp_path, 2, 2))
        assert contents(tmp_path) == before
    words = (
        r"fold 0 is divided into 2 parts, 1 of them finished; --part i/2 goes on, --overwrite starts again$"
    )
    with pytest.raises(InputError, match=words):
        do_share(shared(tmp_path, 1, 1))
    assert do_share(shared(tmp_path, 1, 1, chosen=[2])) == [(2, True)]  # nothing of it was finished
    assert (
        "fold 2: was divided otherwise, or made from something else; begins again" in capsys.readouterr().out
    )
    assert do_share(shared(tmp_path, 1, 1, chosen=[0], overwrite=True)) == [(0, True)]
    assert do_share(shared(tmp_path, 2, 2)) == [(1, True)]


def test_what_was_finished_meanwhile_is_not_finished_again(tmp_path):
    """All shares are done, but a kill came before they were put together; now both processes begin again."""
    do_share(shared(tmp_path, 1, 2, chosen=[0]))
    second = shared(tmp_path, 2, 2, chosen=[0])
    with contextlib.suppress(KeyboardInterrupt), second.at_work({}):
        write(tmp_path, ["sums_f0-2of2.npz"])
        with second.finish_share(0):
            raise KeyboardInterrupt
    first, second = shared(tmp_path, 1, 2, chosen=[0]), shared(tmp_path, 2, 2, chosen=[0])
    with first.at_work({}) as one, second.at_work({}) as two:
        assert one == two == [0]
        assert first.is_share_done(0)
        assert second.is_share_done(0)
        with first.finish_share(0) as facts:
            assert facts == {}
            write(tmp_path, ["map_f0.nii"])
        assert second.is_share_done(0)
        with second.finish_share(0) as facts:
            assert facts is None
    assert record_of(tmp_path)["finished"] == [0]
    assert "shares" not in record_of(tmp_path)


def test_share_whose_progress_is_lost_is_open_again(tmp_path):
    do_share(shared(tmp_path, 1, 2, chosen=[0]))
    (tmp_path / "sums_f0-1of2.npz").unlink()
    assert states_of(tmp_path, SHARED)["fold 0, part 1 of 2"] == "open"
    assert do_share(shared(tmp_path, 2, 2, chosen=[0])) == [(0, False)]
    assert do_share(shared(tmp_path, 1, 2, chosen=[0])) == [(0, True)]


def test_progress_from_other_weights_is_gone_before_the_record_says_the_new_ones(tmp_path, monkeypatch):
    """A kill between the two must not have a later call go on from it."""
    old, new = ({part: {"digest": name} for part in range(3)} for name in "ab")
    with shared(tmp_path, 1, 1, made_from=old).at_work({}):
        write(tmp_path, ["sums_f0.npz"])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            do_share(shared(tmp_path, 1, 1, made_from=new))
    assert "sums_f0.npz" not in contents(tmp_path)


def test_progress_of_an_earlier_version_is_gone_on_from(tmp_path):
    """It did not divide parts, nor say so."""
    with shared(tmp_path, 1, 1).at_work({}):
        write(tmp_path, ["sums_f0.npz"])
    edit(tmp_path, shares={})
    with shared(tmp_path, 1, 1).at_work({}):
        assert "sums_f0.npz" in contents(tmp_path)


WHOLE_ENTRY = {"of": 2, "done": [1], "from": {}}
DAMAGED = [{"of": "x"}, {"of": 0}, {"of": 10**7}, {"done": None}, {"done": ["1"]}, {"from": 3}]


@pytest.mark.parametrize("shares", [[], {"0": []}, *({"0": WHOLE_ENTRY | wrong} for wrong in DAMAGED)])
def test_damaged_shares(tmp_path, shares):
    do_share(shared(tmp_path, 1, 2))
    edit(tmp_path, shares=shares)
    for ask in (lambda: do_share(shared(tmp_path, 1, 2)), lambda: states_of(tmp_path, SHARED)):
        with pytest.raises(InputError, match=r"run\.json: is damaged: '"):
            ask()


def test_shares_of_one_part_are_made_from_the_same(tmp_path):
    first, second = ({part: {"digest": f"{name}{part}"} for part in range(3)} for name in "ab")
    do_share(shared(tmp_path, 1, 2, made_from=first))
    words = r"another process is at work on fold 0 of other weights$"
    at_work = shared(tmp_path, 1, 2, made_from=first, chosen=[0]).at_work({})
    with at_work, pytest.raises(InputError, match=words):
        do_share(shared(tmp_path, 2, 2, made_from=second))
    assert do_share(shared(tmp_path, 2, 2, made_from=second)) == [(0, False), (1, False), (2, False)]
    assert not list(tmp_path.glob("sums_f?-1of2*"))
    assert do_share(shared(tmp_path, 1, 2, made_from=second)) == [(0, True), (1, True), (2, True)]
    assert record_of(tmp_path)["digest"] == {"0": "b0", "1": "b1", "2": "b2"}


def test_part_that_was_killed_while_it_was_put_together_is_put_together_again(tmp_path):
    do_share(shared(tmp_path, 1, 2, chosen=[0]))
    results = shared(tmp_path, 2, 2, chosen=[0])
    with contextlib.suppress(KeyboardInterrupt), results.at_work({}):
        write(tmp_path, ["sums_f0-2of2.npz"])
        with results.finish_share(0) as facts:
            assert facts == {}
            write(tmp_path, ["map_f0.nii"])
            raise KeyboardInterrupt
    assert record_of(tmp_path)["finished"] == []
    assert {"sums_f0-1of2.npz", "sums_f0-2of2.npz"} <= set(contents(tmp_path))
    assert do_share(shared(tmp_path, 1, 2, chosen=[0])) == [(0, True)]


def test_states(tmp_path):
    assert states_of(tmp_path, SHARED) == {}
    do_share(shared(tmp_path, 1, 2, chosen=[0, 1]))
    do_share(shared(tmp_path, 2, 2, chosen=[0]))
    with shared(tmp_path, 2, 2, chosen=[1]).at_work({}), shared(tmp_path, 1, 1, chosen=[2]).at_work({}):
        before = contents(tmp_path)
        expected = {"fold 0": "finished", "fold 1, part 1 of 2": "finished", "fold 1, part 2 of 2": "running"}
        assert states_of(tmp_path, SHARED) == expected | {"fold 2": "running", "summary": "open"}
        assert contents(tmp_path) == before
    states = states_of(tmp_path, SHARED)
    assert (states["fold 1, part 2 of 2"], states["fold 2"]) == ("open", "open")
    do_share(shared(tmp_path, 2, 2, chosen=[1]))
    do_share(shared(tmp_path, 1, 1))
    assert set(states_of(tmp_path, SHARED).values()) == {"finished"}
    for damaged in (None, [[1]], "all"):
        edit(tmp_path, parts=damaged)
        with pytest.raises(InputError, match="'parts' is"):
            states_of(tmp_path, SHARED)


def test_parts_with_names(tmp_path):
    results = results_of(tmp_path, parts=["comparison"])
    with results.at_work({}), pytest.raises(InputError, match=r"at work on comparison$"):
        run(results_of(tmp_path, parts=["comparison"]))
    assert run(results) == (["comparison"], True)
    assert record_of(tmp_path)["finished"] == ["comparison", "summary"]
