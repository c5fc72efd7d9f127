"""Problems as rows: what a record of a file asks, and what its answer is, whatever its columns are called."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_rl.data.records import Record, decode, read_records
from megatron_rl.errors import DataError

PROBLEM_COLUMNS = ("problem", "prompt")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth")
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGES_IN_A_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|type|text)['"]\s*:""")
_MEDIA = re.compile(r"(?:images?|videos?|audios?)(?:_\d+)?")

Message = dict[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Row:
    """One problem of a file. `problem` is the user's last message without the suffix.

    `suffix`, `system` and `turns` (the messages between the system message and the problem) belong to the prompt; None:
    the row says nothing of it, so the config or the preset may.
    """

    id: str
    problem: str
    answer: str
    source: str
    suffix: str | None = None
    system: str | None = None
    turns: tuple[Message, ...] = ()

    @property
    def prompt(self) -> str:
        """Return what the user's last message says."""
        return with_suffix(self.problem, self.suffix or "")

    @property
    def text(self) -> str:
        """Return all that is said of the problem: earlier turns, and the problem."""
        return "\n\n".join([*(turn["content"] for turn in self.turns), self.problem])

    def to_json(self) -> dict[str, Any]:
        """Return the row without the fields of which it says nothing."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def with_suffix(problem: str, suffix: str) -> str:
    """Return the problem with the suffix behind it, once: some files bring it within the problem."""
    return problem if problem.endswith(suffix) else problem + suffix


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of each problem of a file for training or evaluation, in order.

    Without an id of its own a row is called by its number, from 0; without a source, by the file's name.
    Raises: DataError that names the line or row, or for a file without one.
    """
    number = -1
    for number, (where, record) in enumerate(read_records(path)):
        answer = column(record, ANSWER_COLUMNS, where)
        missing = [names for names, value in ((PROBLEM_COLUMNS, column(record, PROBLEM_COLUMNS, where)),
                                              (ANSWER_COLUMNS, answer)) if value is None]  # fmt: skip
        if missing:
            raise DataError(
                f"{where}: lacks {' and '.join(names[0] for names in missing)} (or verl's "
                f"{' and '.join(names[1] for names in missing)}); it has {', '.join(map(str, record)) or 'no field'}; "
                "`megatron-rl data prepare` reads other columns"
            )
        yield where, to_row(record, answer_text(answer, where), where, str(number), Path(path).stem)
    if number < 0:
        raise DataError(f"{path}: holds no problem; expected one JSON object per line with `problem` and `answer`")


def to_row(
    record: Record, answer: str, where: str, number: str, source: str, columns: Sequence[str] = PROBLEM_COLUMNS
) -> Row:
    """Return the row of a record whose answer is read already. `number`, `source`: where it lacks an id or a source.

    Raises: DataError, beginning with `where`, for a problem that is no text, and for what cannot be kept of it.
    """
    for name, value in record.items():
        if _MEDIA.fullmatch(str(name)) and value not in (None, "", [], {}):
            raise DataError(f"{where}: the row comes with `{name}`; only problems of text alone can be asked")
    name = next((name for name in columns if column(record, (name,), where) is not None), columns[0])
    system, turns, problem = _conversation(column(record, (name,), where), where, name)
    if not problem.strip():
        raise DataError(f"{where}: `{name}` must be a text that is not empty, got {problem!r}")
    own_system, own_turns = record.get("system"), record.get("turns")
    if own_system is not None:
        if system is not None:
            raise DataError(f"{where}: a system message both in `{name}` and in `system`; keep one")
        system = _content(own_system, where, "system")
    if own_turns:
        if turns:
            raise DataError(f"{where}: earlier turns both in `{name}` and in `turns`; keep one")
        turns = _messages(own_turns, where, "turns")
    suffix = record.get("suffix")
    own_id = column(record, ("id", "extra_info.index"), where)
    return Row(
        number if own_id is None else answer_text(own_id, where, "id"),
        problem,
        answer,
        answer_text(column(record, ("source", "data_source"), where) or source, where, "source"),
        None if suffix is None else text_of(suffix, where, "suffix"),
        system,
        turns,
    )


def column(record: Record, names: Sequence[str], where: str) -> Any:
    """Return the first value of these columns that is not null, else None. A dot descends into a nested column, which
    may be JSON in a text."""
    for name in names:
        value: Any = record
        for part in name.split("."):
            if isinstance(value, str | bytes):
                value = _json_of(text_of(value, where, name))
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# --- texts and messages -----------------------------------------------------------------------------------------------


def text_of(value: Any, where: str, name: str) -> str:
    """Return a text that can be encoded. Raises: DataError for another type, no UTF-8, or half of a surrogate pair."""
    if isinstance(value, bytes):
        value = decode(value, f"{where}: `{name}`")
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` must be a text, got {value!r:.200}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{name}` holds a lone surrogate, {value[error.start]!r}, at character {error.start + 1}; it is "
            "half of a character and no text: write the whole one, or remove it"
        ) from error
    return value


def _conversation(value: Any, where: str, name: str) -> tuple[str | None, tuple[Message, ...], str]:
    """Return (system message, earlier turns, the user's last message). Raises: DataError."""
    value = _unpacked(value, where, name)
    if isinstance(value, str):
        return None, (), value
    if not isinstance(value, list) or not any(isinstance(item, Mapping) and "role" in item for item in value):
        return None, (), _content(value, where, name)
    messages = _messages(value, where, name)
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages if system is None else messages[1:]
    if any(message["role"] == "system" for message in rest):
        raise DataError(f"{where}: `{name}` has a system message that is not its first message; join them there")
    if not rest or rest[-1]["role"] != "user":
        last = rest[-1]["role"] if rest else "system"
        raise DataError(
            f"{where}: the last message of `{name}` is the {last}'s, expected the user's: a response that is begun "
            "already (a prefill) is not supported; remove that message"
        )
    return system, rest[:-1], rest[-1]["content"]


def _unpacked(value: Any, where: str, name: str) -> Any:
    """Return messages or parts that were written into a text as JSON; anything else as it is, bytes as the text that
    they are. Raises: DataError."""
    if not isinstance(value, str | bytes):
        return value
    text = text_of(value, where, name)
    if not _MESSAGES_IN_A_TEXT.match(text):
        return text
    value = _json_of(text)
    if value is None:
        raise DataError(f"{where}: `{name}` looks like messages written as a text, but it is not JSON: {text!r:.100}")
    return value


def _messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    value = _unpacked(value, where, name)
    if not isinstance(value, list):
        raise DataError(f"{where}: `{name}` must be a list of messages, got {value!r:.200}")
    messages = []
    for i, message in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise DataError(
                f"{where}: `{place}` must have a `role` of {', '.join(_ROLES)} and `content`, got {message!r:.200}"
            )
        others = [key for key, item in message.items() if key not in ("role", "content") and item not in (None, "", [])]
        if others:
            raise DataError(f"{where}: `{place}` has {', '.join(others)}, which would be lost; only text is supported")
        messages.append({"role": str(message["role"]), "content": _content(message.get("content"), where, place)})
    return tuple(messages)


def _content(value: Any, where: str, name: str) -> str:
    """Return the text of a message: a text, or the joined texts of typed parts. Raises: DataError."""
    value = _unpacked(value, where, name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `{name}` must be a text or a list of messages, got {value!r:.200}")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(f"{where}: `{name}[{i}]` is {kind!r:.100}, expected a part of type 'text'")
        texts.append(text_of(part.get("text"), where, f"{name}[{i}].text"))
    return "".join(texts)


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_text(value: Any, where: str, name: str = "answer") -> str:
    """Return an answer as the verifiers get it: a text as it is, a whole float as an integer, all else as JSON.

    Raises: DataError for NaN, infinities, and types that JSON does not have.
    """
    if isinstance(value, str | bytes):
        return text_of(value, where, name)
    return text_of(json.dumps(_plain(value, where, name), ensure_ascii=False), where, name)


def _plain(value: Any, where: str, name: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, bytes):
        return decode(value, f"{where}: `{name}`")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise DataError(f"{where}: `{name}` is {value}, which answers nothing; give the answer or remove the row")
        whole = int(value)
        # from 1e16 on Python writes floats with an exponent
        return whole if value == whole and abs(whole) < 10**16 else float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, name) for item in value]
    raise DataError(f"{where}: `{name}` is {value!r:.100} ({type(value).__name__}); expected a text, a number or JSON")
