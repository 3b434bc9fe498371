"""What is told of errors that are not ours."""

from studio.errors import reason_of


def test_the_first_line_of_an_error_is_told_or_its_kind_if_it_says_nothing():
    assert reason_of(ValueError("\nno header\nat byte 0")) == "no header"
    assert reason_of(NotImplementedError()) == "NotImplementedError"
