"""The ledger of slots: nobody's columns twice, whatever the ranks, the order and the processes."""

import base64
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from studio import slots
from studio.errors import PresetError, RequestError
from studio.slots import Bank, capacity, choose, claim, find, free_slots, holdings, ledger_path, release

BANK = Bank("sd", "architecture", "layout")


def sketch(values):
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


def take(concept, rank, width=64, bank=BANK):
    slot = choose(bank, concept, rank, width, "unet.narrow")
    return claim(bank, concept, slot, rank, width, concept)


def test_nothing_is_written_by_looking(home):
    assert holdings() == []
    assert choose(BANK, "cat", 4, 64) == 0
    assert not home.exists()


def test_concepts_of_different_ranks_never_share_a_column():
    for number, rank in enumerate((4, 2, 8, 3, 1, 4, 5, 2)):
        take(f"concept {number}", rank)
    taken = holdings(BANK)
    assert len(taken) == 8
    for one, other in combinations(taken, 2):
        assert not set(one.columns) & set(other.columns)
    assert all(one.columns.stop <= 64 for one in taken)


def test_a_concept_that_trains_again_gets_its_own_slot():
    take("cat", 4)
    dog = take("dog", 4)
    assert choose(BANK, "dog", 4, 64) == dog.slot == 1
    assert claim(BANK, "dog", 1, 4, 64) == dog
    assert len(holdings()) == 2
    # With another rank its own columns count as free, and the old ones stay its own.
    assert choose(BANK, "dog", 2, 64) == 2
    take("dog", 2)
    assert choose(BANK, "fox", 4, 64) == 2
    assert len(holdings()) == 3


def test_a_full_bank_names_its_capacity_and_the_narrowest_layer():
    for number in range(capacity(20, 6)):
        take(f"concept {number}", 6, width=20)
    with pytest.raises(PresetError) as caught:
        choose(BANK, "one more", 6, 20, "unet.narrow")
    for word in ("3 fit", "unet.narrow", "20 columns", "rank 6"):
        assert word in caught.value.message
    for way_out in ("smaller rank", "free a slot", "gram"):
        assert way_out in caught.value.hint
    assert choose(BANK, "one more", 2, 20) == 9  # the two columns that are left over
    assert choose(BANK, "wide layers only", 6, 640) == 3


def test_a_slot_beyond_the_narrowest_layer_is_not_given_out():
    with pytest.raises(PresetError, match=r"no slot 3: .*unet\.narrow.* 0 to 2"):
        choose(BANK, "cat", 20, 64, "unet.narrow", wanted=3)
    with pytest.raises(PresetError, match=r"rank 65 is more than the 64 columns"):
        choose(BANK, "cat", 65, 64, "unet.narrow")


def test_a_wanted_slot_is_given_unless_another_concept_is_in_its_columns():
    assert choose(BANK, "cat", 4, 64, wanted=7) == 7
    claim(BANK, "cat", 7, 4, 64, "cat")
    assert choose(BANK, "cat", 4, 64, wanted=7) == 7
    with pytest.raises(PresetError, match=r"slot 14 meets slot 7 \(rank 4\) of 'cat'"):
        choose(BANK, "dog", 2, 64, wanted=14)


def test_what_another_training_took_since_the_plan_is_refused():
    planned = choose(BANK, "cat", 4, 64)
    take("dog", 4)
    with pytest.raises(PresetError, match="'dog'"):
        claim(BANK, "cat", planned, 4, 64)
    assert [one.concept for one in holdings()] == ["dog"]


def test_a_freed_slot_is_the_next_to_be_given_out():
    take("cat", 4), take("dog", 4)
    assert free_slots(BANK, 4, 20) == [2, 3, 4]
    release(find("cat"))
    assert free_slots(BANK, 4, 20) == [0, 2, 3, 4]
    assert take("fox", 4).slot == 0
    with pytest.raises(RequestError, match="no slot is held by 'cat'"):
        find("cat")


def test_banks_are_one_where_columns_can_meet_and_apart_otherwise():
    one, nearly, other = (sketch(values) for values in ([1.0, 2.0], [1.001, 2.0], [1.0, 3.0]))
    take("cat", 4)
    assert not holdings(Bank("sd", "other architecture", "layout"))
    assert not holdings(Bank("sd", "architecture", "other layout"))
    assert holdings(Bank("fine-tune", "architecture", "layout"))
    take("dog", 4, bank=Bank("sd", "architecture", "null", one))
    assert holdings(Bank("in half precision", "architecture", "null", nearly))
    assert not holdings(Bank("sd", "architecture", "null", other))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format_version": 1}', '{"format_version": 1, "holdings": [{"slot": 1}]}', '{"a": null}']
)
def test_a_damaged_ledger_is_named_and_never_overwritten(home, content):
    home.mkdir()
    ledger_path().write_text(content)
    for act in (holdings, lambda: choose(BANK, "cat", 4, 64), lambda: claim(BANK, "cat", 0, 4, 64)):
        with pytest.raises(RequestError, match=r"slots\.json.*damaged"):
            act()
    assert ledger_path().read_text() == content


def test_a_newer_ledger_is_left_alone(home):
    home.mkdir()
    ledger_path().write_text(json.dumps({"format_version": 2, "holdings": []}))
    with pytest.raises(RequestError, match="newer studio"):
        holdings()


PROCESS = """
import sys
from studio.errors import PresetError
from studio.slots import Bank, choose, claim
bank, me = Bank("sd", "architecture", "layout"), sys.argv[1]
lost = 0
print("ready", flush=True)
sys.stdin.readline()
for number in range(12):
    rank = 1 + number % 3
    while True:
        slot = choose(bank, f"{me} {number}", rank, 64)
        try:
            claim(bank, f"{me} {number}", slot, rank, 64)
            break
        except PresetError:
            lost += 1
print(lost)
"""


def test_two_processes_never_take_the_same_columns():
    root = Path(__file__).parent.parent
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    jobs = [
        subprocess.Popen([sys.executable, "-c", PROCESS, me], cwd=root, text=True, **pipes) for me in ("one", "other")
    ]
    for job in jobs:
        assert job.stdout.readline() == "ready\n", job.stderr.read()[-800:]
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors[-800:]
    taken = holdings(BANK)
    assert len(taken) == 24
    assert len({(one.concept) for one in taken}) == 24
    columns = [column for one in taken for column in one.columns]
    assert len(columns) == len(set(columns)) == 2 * 4 * (1 + 2 + 3)
    assert slots.ledger_path().with_suffix(".lock").exists()
