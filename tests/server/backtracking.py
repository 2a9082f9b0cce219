"""How many steps a regular expression takes: a small backtracking matcher that counts.

It walks the tree that ``re`` itself compiles from, in the way that ``re`` does but without its
shortcuts, so its count is an upper bound that depends on no clock. For the constructs that our
expressions have; any other is refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from re import _parser  # type: ignore[attr-defined]
from typing import Any

Pattern = re.Pattern[str] | re.Pattern[bytes]
_Go = Callable[[int], bool]
_SPACES = frozenset(" \t\n\r\f\v")
_SAMPLES = "a0 _-/.:;,=<>%*xAZ\n\\\"'[]!@é"


class Steps:
    """The steps of one attempt after another to match one text."""

    def __init__(self, pattern: Pattern, text: str) -> None:
        self.count = 0
        self._text = text
        self._ignores_case = bool(pattern.flags & re.IGNORECASE)
        self._dot_is_all = bool(pattern.flags & re.DOTALL)
        self._tree = list(tree_of(pattern))

    def at(self, start: int, *, full: bool) -> bool:
        """Try to match from ``start``, with ``full`` up to the end of the text."""
        return self._all(self._tree, start, lambda at: not full or at == len(self._text))

    def _all(self, items: Sequence[Any], at: int, go_on: _Go) -> bool:
        if not items:
            return go_on(at)
        rest = items[1:]
        return self._one(items[0], at, lambda after: self._all(rest, after, go_on))

    def _one(self, item: Any, at: int, go_on: _Go) -> bool:
        self.count += 1
        name, argument = str(item[0]), item[1]
        match name:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                is_there = at < len(self._text) and self._fits(item, self._text[at])
                return is_there and go_on(at + 1)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                return self._repeat(argument, at, go_on, is_lazy=name == "MIN_REPEAT")
            case "SUBPATTERN":
                return self._all(list(argument[3]), at, go_on)
            case "BRANCH":
                return any(self._all(list(each), at, go_on) for each in argument[1])
            case "ASSERT":
                return self._all(list(argument[1]), at, lambda _: True) and go_on(at)
            case "ASSERT_NOT":
                return not self._all(list(argument[1]), at, lambda _: True) and go_on(at)
            case "AT":
                is_start = "BEGINNING" in str(argument)
                return at == (0 if is_start else len(self._text)) and go_on(at)
        raise NotImplementedError(name)

    def _repeat(self, how: Any, start: int, go_on: _Go, *, is_lazy: bool) -> bool:
        least, most, body = int(how[0]), int(how[1]), list(how[2])
        if len(body) == 1 and str(body[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._repeat_one(body[0], (least, most), start, go_on, is_lazy=is_lazy)

        def again(done: int, at: int) -> bool:
            def more() -> bool:
                return done < most and self._all(
                    body, at, lambda after: (after > at or done < least) and again(done + 1, after)
                )

            if done < least:
                return more()
            return (go_on(at) or more()) if is_lazy else (more() or go_on(at))

        return again(0, start)

    def _repeat_one(
        self, item: Any, times: tuple[int, int], start: int, go_on: _Go, *, is_lazy: bool
    ) -> bool:
        end = start
        while (
            end < len(self._text) and end - start < times[1] and self._fits(item, self._text[end])
        ):
            end += 1
            self.count += 1
        ends = range(start + times[0], end + 1)
        for at in ends if is_lazy else reversed(ends):
            self.count += 1
            if go_on(at):
                return True
        return False

    def _fits(self, item: Any, character: str) -> bool:
        forms = {character}
        if self._ignores_case:
            forms |= {character.lower(), character.upper()}
        return any(fits(item, each, dot_is_all=self._dot_is_all) for each in forms)


def fits(item: Any, character: str, *, dot_is_all: bool = False) -> bool:
    """Whether ``item``, which stands for one character, stands for this one."""
    name, argument = str(item[0]), item[1]
    match name:
        case "LITERAL":
            return ord(character) == int(argument)
        case "NOT_LITERAL":
            return ord(character) != int(argument)
        case "ANY":
            return dot_is_all or character != "\n"
        case "RANGE":
            return int(argument[0]) <= ord(character) <= int(argument[1])
        case "CATEGORY":
            return _is_of(str(argument), character)
        case "IN":
            is_negated = str(argument[0][0]) == "NEGATE"
            members = argument[1:] if is_negated else argument
            return any(fits(each, character) for each in members) != is_negated
    raise NotImplementedError(name)


def _is_of(category: str, character: str) -> bool:
    kinds = {"DIGIT": str.isdecimal, "SPACE": lambda c: c in _SPACES}
    kinds["WORD"] = lambda c: c.isalnum() or c == "_"
    is_in = kinds[category.rpartition("_")[2]](character)
    return is_in != ("_NOT_" in category)


def tree_of(pattern: Pattern) -> Any:
    """What ``re`` makes of the pattern before it compiles it."""
    return _parser.parse(pattern.pattern, pattern.flags)


def worst_steps(pattern: Pattern, size: int, *, is_searched: bool) -> int:
    """The most steps for texts of about ``size`` characters that are made to be hard for it.

    Each begins like a match, goes on with characters of the pattern again and again, and ends in
    what spoils it.
    """
    most = 0
    for text in _hard_texts(pattern, size):
        steps = Steps(pattern, text)
        for start in range(len(text)) if is_searched else (0,):
            if steps.at(start, full=not is_searched):
                break
        most = max(most, steps.count)
    return most


def _hard_texts(pattern: Pattern, size: int) -> Iterator[str]:
    beginnings, loops = _parts(list(tree_of(pattern)))
    pumps = {_sample(item) for item in loops} | {"".join(map(_sample, loops))}
    pumps |= {_sample(one) + _sample(other) for one in loops for other in loops}
    pumps |= {_text_of(beginnings)}
    cuts = {len(beginnings) * part // 4 for part in range(5)}
    starts = {_text_of(beginnings[:count]) for count in cuts}
    for start in starts:
        for pump in pumps - {""}:
            for end in ("", "\0"):
                yield (start + pump * (size // len(pump)))[:size] + end


def _parts(items: Sequence[Any], *, is_loop: bool = False) -> tuple[list[Any], list[Any]]:
    """What a short match is made of; and all that stands for one character within a repeat."""
    short: list[Any] = []
    singles: list[Any] = []
    for item in items:
        name, argument = str(item[0]), item[1]
        inner: list[Sequence[Any]] = []
        times = 1
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            short.append(item)
            singles += [item] if is_loop else []
        elif "REPEAT" in name:
            inner, times = [list(argument[2])], max(1, int(argument[0]))
        elif name == "SUBPATTERN":
            inner = [list(argument[3])]
        elif name == "BRANCH":
            inner = [list(each) for each in argument[1]]
        for place, each in enumerate(inner):
            is_repeated = is_loop or ("REPEAT" in name and int(argument[1]) > 1)
            shorter, more = _parts(each, is_loop=is_repeated)
            short += shorter * times if place == 0 else []
            singles += more
    return short, singles


def _text_of(items: Sequence[Any]) -> str:
    return "".join(map(_sample, items))


def _sample(item: Any) -> str:
    """A character that ``item`` stands for."""
    if str(item[0]) == "LITERAL":
        return chr(int(item[1]))
    found = [each for each in _SAMPLES if fits(item, each)]
    return found[0] if found else ""
