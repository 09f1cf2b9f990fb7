"""errors.py: a name in front of a mistake, and of nothing else."""

import pytest

from internals.errors import Failure, InputError, blaming


def test_blaming_puts_a_name_in_front_of_a_mistake_alone():
    with pytest.raises(InputError, match=r"^--mask a: is empty$"), blaming("--mask a"):
        raise InputError("is empty")
    for fault in (ValueError, Failure):
        with pytest.raises(fault, match=r"^a fault$"), blaming("--mask a"):
            raise fault("a fault")
