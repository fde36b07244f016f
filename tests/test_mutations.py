"""The list of faults in mutations.py fits the code.

Whether the tests catch the faults is a run of its own, which takes an hour.
"""

from tests.mutations import FAULTS, REPOSITORY, TESTS, with_fault


def test_every_fault_is_in_the_code_once_and_its_tests_exist():
    for fault in FAULTS:
        assert with_fault(fault, REPOSITORY) != (REPOSITORY / fault.file).read_text(), fault.name
    assert {fault.area for fault in FAULTS} == TESTS.keys()
    assert all((REPOSITORY / path).exists() for paths in TESTS.values() for path in paths)
