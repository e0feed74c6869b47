"""What every section is made of: kinds of values with their bounds, and the base class. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# What no setting may go beyond: whole numbers of torch and numpy have 64 bits, and most others become fp32.
MAX_INT, MAX_FLOAT = 2**63 - 1, 3.4028234663852886e38


def clean_path(text: str) -> str:
    """`text` with ~ and ~user at its start as a shell reads them. Raises ValueError for what no file system takes."""
    check_text(text)
    if text.startswith("~"):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise ValueError(f"names a home that is not here: {text.partition('/')[0]!r}")
    if len(text.encode()) > 4095 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(
            f"is too long for a path: 4095 bytes in all and 255 between slashes, got {len(text.encode())} bytes"
        )
    return text


def check_text(text: str) -> None:
    """Raises ValueError for what cannot be written to a file's name or to a text file."""
    if "\0" in text:
        raise ValueError(f"holds a NUL character, got {text[:40]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"is not valid Unicode, got {text[:40]!r}") from None


def _clean_source(text: str) -> str:
    """A file or dataset, or name=file or dataset."""
    name, equals, path = text.rpartition("=")
    return name + equals + clean_path(path)


def _check(value: Any) -> None:
    """Raises ValueError for numbers and texts that fit no setting."""
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, int) and abs(value) > MAX_INT:
        raise ValueError(f"must fit into 64 bits, got a number of {value.bit_length()} bits")
    elif isinstance(value, float) and abs(value) > MAX_FLOAT:
        raise ValueError(f"must fit into fp32, got {value:g}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key)
            _check(item)


FilePath = Annotated[str, AfterValidator(clean_path)]


# A file or folder (or name=file): when it is relative and not under the working directory, it is looked up beside the config
# file. What is there under no such name is left as it is: it may be a name on the hub.
FILE = "file"


File = Annotated[str, FILE, AfterValidator(_clean_source)]


Seed = Annotated[int, Field(ge=0, le=MAX_INT)]


Tokens = Annotated[int, Field(ge=1, le=2**24)]  # in one sequence


Rows = Annotated[int, Field(ge=1, le=2**20)]  # at once in memory


Seconds = Annotated[float, Field(gt=0, le=1e7)]  # what timers take


# Outside these bounds fp32 logits divided by it are all equal, or overflow.
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, docstrings under fields are their descriptions.

    Numbers are finite, fit into 64 bits or fp32, and are no booleans; texts can be written to files.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError(f"takes no true or false, got {str(value).lower()}")
        return value

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        _check(value)
        return value


def check_shares(section: Any, what: str) -> None:
    """Raises ValueError when validation and test together leave nothing to train on."""
    if section.val_share + section.test_share >= 1:
        raise ValueError(f"val_share + test_share must leave {what}, got {section.val_share} + {section.test_share}")
