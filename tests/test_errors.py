"""Every error has its exit code, its stable code, and says what to do next."""

import pytest

from autotune import errors
from autotune.errors import AutotuneError, did_you_mean

EXIT_CODES = {
    "AutotuneError": 1,
    "UsageError": 2,
    "InputError": 3,
    "InfeasibleError": 4,
    "DeviceError": 5,
    "VerificationError": 6,
    "BusyError": 75,
}


def test_the_tree_is_what_its_docstring_draws():
    classes = {
        name: item
        for name, item in vars(errors).items()
        if getattr(item, "__module__", "") == errors.__name__ and isinstance(item, type)
    }
    assert {name: item.exit_code for name, item in classes.items()} == EXIT_CODES
    assert all(issubclass(item, AutotuneError) for item in classes.values())
    for name, code in EXIT_CODES.items():
        assert any(name in line and f"exit {code} " in f"{line} " for line in errors.__doc__.splitlines())


def test_text_is_code_message_and_hint():
    error = errors.InputError("model.pickle", "weights.bin is a pickle.", "Convert it.")
    assert str(error) == "model.pickle: weights.bin is a pickle. Convert it."
    assert str(errors.InputError("a.b", "What.")) == "a.b: What."


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("bf61", "Did you mean 'bf16'?"),
        ("w4a16-int4", "Did you mean 'w4a16-int4-g64' or 'w8a8-int8'?"),
        ("zzz", "Known: bf16, w4a16-int4-g64, w8a8-int8."),
    ],
)
def test_the_closest_known_word_is_offered(word, hint):
    assert did_you_mean(word, ["w8a8-int8", "bf16", "w4a16-int4-g64"]) == hint
