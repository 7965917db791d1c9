"""Several processes give the numbers of one, and those that are out of step are told so."""

import json
import math

import pytest

from processes import run
from programs.same_results import results


@pytest.fixture(scope="module")
def of_one_process():
    return json.loads(json.dumps(results()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "cases"),
    [(2, 4, ()), (4, 2, ("2 axes, rows over one, within processes", "large", "served"))],  # there across two of them
    ids=["2 of 4 devices", "4 of 2 devices"],
)
def test_many_processes_give_the_numbers_of_one_to_the_digit(processes, devices, cases, of_one_process):
    assert of_one_process["1 axis, explicit"]["flush sends"] == {"all-to-all": 1, "all-gather": 1}, "with a quantile"
    assert of_one_process["2 axes, rows over one, across processes"]["flush sends"] == {"all-gather": 1}
    for rank, printed in enumerate(run("same_results.py", processes, *cases, devices=devices)):
        mine = json.loads(printed)
        wanted = of_one_process | {"served": of_one_process["served"] | ({} if rank == 0 else {"written": {}})}
        assert mine.keys() == set(cases or wanted)
        for case in mine:
            for what, number in wanted[case].items():
                assert mine[case][what] == number, f"process {rank}: {case}: {what}"


@pytest.fixture(scope="module")
def heard():
    """What each of two processes heard of the mistakes in ``programs/out_of_step.py``."""
    return [json.loads(printed) for printed in run("out_of_step.py", processes=2)]


GIVEN = "what eager updates were given: names, shapes, or numbers of the host"
SEEN = "2 eager updates of values with the checksum"
ADVICE = {GIVEN: "make_array_from_process_local_data(", "the spec or mesh": "Make the object alike in every process"}
STEP = "if jax.process_index() == 0: print(window)"
MISTAKES = {
    "another operation": ("{loss: mean}", "{loss: max}", "the spec or mesh"),
    "one metric more": ("{loss: mean}", "{loss: mean, accuracy: mean}", "the spec or mesh"),
    "another order": ("flush 2, ", "flush 1, ", "the number of the flush of this object, the number of eager updates"),
    "flush in process 0 only": ("with 1 eager update,", "with 2 eager updates,", "the number of eager updates"),
    "and the next flush": ("with 1 eager update,", "with 0 eager updates,", "the number of eager updates"),
    "compute meets flush": ("a compute() before flush 1", "flush 1,", "whether they flush or compute"),
    "other numbers, 0.0": (SEEN, SEEN, GIVEN),
    "other numbers, np.float32(0.0)": (SEEN, SEEN, GIVEN),
    "other numbers, array([0., 0., 0., 0.])": (SEEN, SEEN, GIVEN),
    "other numbers, Array(0., dtype=float32, weak_type=True)": (SEEN, SEEN, GIVEN),
    "other names": ("1 eager update of values", "1 eager update of values", GIVEN),
    "other weights": (SEEN, SEEN, GIVEN),
    "other windows": ("flush 1 after step 1,", "flush 1 after step 2,", "the step, the number of eager updates"),
    "another size, with a limit": ("{loss: mean}", "{loss: mean, x: histogram of 9999 bins", "the spec or mesh"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_process_that_is_out_of_step_is_an_error_on_all_that_says_which_and_what(mistake, heard):
    of_the_first, of_the_second, differs = MISTAKES[mistake]
    for process in heard:
        [error] = [one for one in process[mistake] if isinstance(one, str)][-1:]
        lines = error.splitlines()
        assert "the processes did not make the same flush" in lines[0]
        assert lines[1].startswith("  Process 0: ")
        assert of_the_first in lines[1]
        assert lines[2].startswith("  Process 1: ")
        assert of_the_second in lines[2]
        assert lines[3] == f"  They differ in {differs}."
        assert ADVICE.get(differs, STEP) in lines[-1]


def test_equal_numbers_of_other_kinds_are_in_step(heard):
    assert [process["the same numbers of other kinds"] for process in heard] == [[{"loss": 1.5}]] * 2


def test_a_loop_that_is_out_of_step_stops_before_it_flushes_again(heard):
    """At the step after which its thread is known to have read what was gathered, at the latest."""
    assert all(process["other windows"][1] <= 4 for process in heard)
    assert all(process["other windows"][2] == {} for process in heard), "a number was written"


def test_a_training_step_that_meets_a_flush_gives_no_number(heard):
    [error] = heard[0]["a training step meets a flush"]
    assert "2 rows came from a program that is no flush" in error


def test_with_a_limit_a_mistake_loses_nothing_and_flushes_in_step_give_numbers(heard):
    for process in heard:
        assert process["another size, with a limit"][1] == {"loss": 1.0}
        first, second = process["in step, with a limit"]
        assert first == {"loss": 1.0}
        assert math.isnan(second["loss"])


def test_a_flush_with_a_limit_on_process_0_only_names_the_others_and_loses_nothing(heard):
    [error] = heard[0]["process 0 only, with a limit"]
    assert error.startswith("TimeoutError: metrics.flush(timeout=1): process 1 of 2 did not come within 1 s.")
    assert [process["and all of them"] for process in heard] == [[{"loss": 1.0}]] * 2
    assert "process 1 of 2 did not come" in heard[0]["process 0 only, with a limit, again"][0]
    assert [process["and all of them, with a limit"] for process in heard] == [[{"loss": 2.0}]] * 2


def test_only_the_processes_of_a_mesh_take_part_and_the_first_of_them_writes():
    outside, first, second = (json.loads(printed) for printed in run("sub_mesh.py", processes=3))
    seen = {"x/mean": 5.5, "x/count": 12.0, "steps": 1.0}
    for process in (first, second):
        assert process["traced"] == process["computed"] == process["flushed"] == seen
        assert process["per device"] == [3.0, 3.0, 3.0, 3.0]
        assert process["merged"] == {name: 2 * n if name != "x/mean" else n for name, n in seen.items()}
        assert process["total"] == 1.5
        assert process["derived"] == [0.5, 2.5]
        assert "'x' lies on other devices than the accumulators" in process["refused"]
        assert "The value:        " in process["refused"]
        assert "The accumulators: Mesh('data': 4" in process["refused"]
    assert first["written"] == {"step": [1, 3], "value": [0.5, 2.5]}
    assert second["written"] is None
    assert outside == {
        "computed": {}, "flushed": {}, "is NaN": True, "merged": {}, "total": None, "derived": [], "written": None,
    }  # fmt: skip
