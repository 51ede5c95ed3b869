"""Answers: what a text says is its answer, and whether it is the right one.

Also the script of the processes in which `builtin.py` does what may hang (mathematics, patterns): it reads one JSON
request a line and writes one JSON answer a line. It imports nothing of this package, so that it starts quickly.
"""

import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import product
from typing import Any

# ---- Text -> the stretch that holds the answer ----

MARKED = re.compile(r"####[ \t]*([^\n]*)")
BOX = re.compile(r"\\(?:f?boxed|fbox)(?![A-Za-z])\s*")
JOINED = re.compile(r"[\s$]*(?:[,;&]|(?:,\s*)?(?:\\(?:text|mbox)\{)?\s*\b(?:and|or)\b\s*\}?)[\s$]*")  # two boxes
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SAID = re.compile(
    r"(?i)(?:\b(?:answer|(?:correct|right) (?:choice|option)|r[ée]ponse|respuesta|risposta|resposta|antwort|ответ)"
    r"(?:\s+is)?\W*?(?:[:：]|\b(?:is|est|es|è|é|ist)\b\s*[:：]?)|\b(?:choose|pick|select)\s+(?:option|choice)\b"
    r"|答案\s*(?:[是为為：:]\s*)+|答え\s*[は：:]|답\s*[은는：:])\s*([^\n]+)"
)
THOUGHT = re.compile(
    r"(?i)</[\w:]*(?:think|thought|reason|analysis|reflection|scratchpad)\w*>|\[/THINK\]|◁/think▷"
    r"|<\|end_(?:of_thought|thinking)\|>|<\|channel\|>final<\|message\|>|assistantfinal"
)
"""Ends of what models think before they answer; the last two are gpt-oss's, with its special tokens and without."""


MINUS = re.compile(
    r"(?i)(?:\\text\s*\{\s*(?:minus|negative)\s*\}\s*"
    r"|((?:^|[=:({$]|\b(?:is|be|equals|to|answer|of|a))\s*\$?)(?:minus|negative)\s+)(?=\$?[\d.])"
)
"""A sign in words: behind a number it takes away."""
NEGATED = re.compile(
    r"(?:[,(]\s?)?\b(?:(?i:and not|not|isn't|rather than|instead of))\s{1,3}(?:(?i:option|choice)\s)?"
    r"(?:\$?-?\d+(?:[.,/]\d+)*(?![\w^*+/-]| *[-+*/=^])[%$]?|\(?[A-J]\b(?! \w)\)?)\)?"
)
"""A number or a choice that is said not to be the answer."""


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` or `\fbox{}`; "" if it is not closed, None if there is none.

    Several that a comma or "and" joins are one list.
    """
    contents, first = list[str](), len(text)
    for box in reversed(list(BOX.finditer(text))):
        rest = text[box.end() :]
        content, end = re.split(r"[\s$]", rest, maxsplit=1)[0], None
        if rest.startswith("{"):
            end = _closed(rest)
            content = rest[1 : end - 1] if end else ""
        if contents and not (end and JOINED.fullmatch(text[box.end() + end : first])):
            break
        contents, first = [content, *contents], box.start()
    return ", ".join(dict.fromkeys(contents)) if contents else None


def concluded(text: str, gold: str | None = None) -> str:
    """What is said behind the last thought; all of the text where nothing of it could be an answer.

    A choice or words could be one where the gold is of their kind.
    """
    text = NEGATED.sub("", MINUS.sub(lambda found: f"{found[1] or ''}-", text))
    final = text[max((end.end() for end in THOUGHT.finditer(text)), default=0) :]
    said = any(marks.search(final) for marks in (TAGGED, BOX, SAID))
    kind = gold is not None and (chosen(final) if letter_of(gold) else words_of(gold) and words_of(final))
    return final if said or kind or re.search(r"[\d$]|\\\(|\\\[", final) else text


def _closed(text: str) -> int | None:
    """Where the group that begins the text ends; None if it does not."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (match.group() == "{") - (match.group() == "}")
        if not depth:
            return match.end()
    return None


# ---- Text -> plain text: what typesetting adds taken off ----

LATEX = r"\times |\cdot |/|\pi |\infty |\le |\ge |\pm |\cup |\in |^\circ|\frac{1}{2}|\frac{1}{4}|\frac{3}{4}|/"
SIGNS = str.maketrans(
    dict.fromkeys("\u2212\u2013\u2010\u2011", "-")
    | dict.fromkeys("\u00a0\u202f\u2009", " ")
    | dict(zip("。，：（）％", ".,:()%", strict=True))
    | dict(zip("×·÷π∞≤≥±∪∈°½¼¾\u2044", LATEX.split("|"), strict=True))
)
WORDING = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|math(?:rm|bf|it)|boldsymbol|bm|emph|operatorname)\s*\{([^{}]*)\}"
CURRENCY = r"(?:\\?\$|[€£¥₹₩₽])"
MONEY = rf"(?:{CURRENCY}|\\text\s*\{{\s*{CURRENCY}\s*\}}|\bRs\.?(?=\s*\d)|\bUSD\b|\bEUR\b)"
# A space of typesetting, a brace, a comma that cannot end a list: all between groups of three digits.
BETWEEN_DIGITS = r"(?<=\d)(?:,\s*\\!\s*|\{,\}|\\,|\\!|\\;|\\:|\\ |~|['’]|(?<!\.)[, ])(?=\d{3}(?!\d))"
LIST = re.compile(r"(?:-?(?:\d{1,3}(?:,\d{3})+|\d+),\s+)+-?(?:\d{1,3}(?:,\d{3})+|\d+)")
POINTS = re.compile(r"(?<![\w,.])\d{1,3}(?:\.\d{3}){2,}(?![\w,]|\.\d)")
INDIAN = re.compile(r"(?<![\d,.])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])")  # 1,00,000; it could also be a list


SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"


def typeset(text: str) -> str:
    """The text with LaTeX in the place of signs."""

    def power(found: re.Match[str]) -> str:
        digits = found[0].translate(str.maketrans(SUPERSCRIPT, "0123456789-"))
        return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"

    text = re.sub(f"[{SUPERSCRIPT}]+", power, text.translate(SIGNS))
    return re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda found: f"\\sqrt{{{found[1] or found[2]}}}", text)


def plain(text: str) -> str:
    """Without dollars and boxes around it, spacing, `\\left`, and thousands' separators."""
    text = re.sub(r"(?:\\?\s)+$", "", typeset(text)).strip()
    text = re.sub(r"(?i)^(?:\\text\s*\{\s*)?(?:minus|negative)\s*\}?\s*(?=[\d.$])", "-", text)
    before = None
    while text != before:
        before = text
        text = text.strip().strip("*").removesuffix(".").strip()
        for pattern in (r"\$\$(.*)\$\$", r"\$((?:[^$]|\\\$)*)(?<!\\)\$", r"\\\((.*)\\\)", r"\\\[(.*)\\\]"):
            if whole := re.fullmatch(pattern, text, re.DOTALL):
                text = whole[1]
        box = BOX.match(text)
        if box and text[box.end() :].startswith("{") and _closed(text[box.end() :]) == len(text) - box.end():
            text = text[box.end() + 1 : -1]
    text = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])\s*", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("\\varnothing", "\\emptyset").replace("{:}", ":")
    if LIST.fullmatch(text):  # 1,000, 2,000: only commas without a space are thousands'
        text = re.sub(r",(?=\d)", "", text)
    elif re.match(rf"[-+]?\s*{MONEY}?\s*\d{{1,3}}(?!\d)", text) and not re.search(r"\d,\s+\d", text):
        grouped = re.sub(BETWEEN_DIGITS, "", text)
        # 3,5,700 is a list: each group after the first has three digits.
        text = grouped if not re.search(r"\d,\d", grouped) else text
    text = re.sub(r"(\\\\)|\\(?:[!,;:> ]|quad|qquad)|~", lambda match: match[1] or " ", text)
    return " ".join(text.split())


# ---- Text -> a number ----

LETTER = "A-Za-zÀ-ÖØ-öø-ɏЀ-ӿ\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"  # not Greek, whose letters are variables
UNIT = (
    rf"(?:\^\{{?(?:{WORDING}|st|nd|rd|th)\}}?|{WORDING}|(?:\^?\{{?\\circ\}}?|\\degree)\s*[CFK]?|\\?%"
    rf"|[{LETTER}.]+(?:[ /*-][{LETTER}.]+)*)(?:\s*\^\{{?\d\}}?)?"
)
WHOLE = r"(?:\d+\.?\d*|\.\d+)"
POWER = r"(?:\\times|\\cdot|[*x])\s*10\s*(?:\^|\*\*)\s*\{?\s*(-?\s*\d+)\s*\}?"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*{MONEY}?\s*(?P<inner>[-+]?)\s*"
    rf"(?:(?P<mixed>\d+)(?:\s*(?=\\frac)|\s+(?=\d+\s*/)))?"
    rf"(?:\\frac\s*(?P<top>\{{\s*-?{WHOLE}\s*\}}|\d)\s*(?P<bottom>\{{\s*-?{WHOLE}\s*\}}|\d)"
    rf"|(?P<value>{WHOLE})(?:\s*/\s*(?P<over>{WHOLE}))?(?:[eE](?P<e>[-+]?\d+)|\s*{POWER})?)"
    rf"\s*{MONEY}?\s*(?P<unit>{UNIT})?\.?"
)
MOST_DIGITS = 400
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
MULTIPLE = re.compile(r"\s*\b(?:(hundred)|(thousand)|(million)|(billion)|(trillion))s?\b", re.IGNORECASE)
TENS = (2, 3, 6, 9, 12)  # powers of these words


SYMBOL = re.compile(
    "[cdkmn]?m|[km]?g|kgs|[cdkm]?[lL]|ha|s|d|[mnu]s|secs?|mins?|h|hrs?|yrs?|in|ft|yd|mi|lbs?|oz|pt|qt|gal|sq|cu|cc|ct"
    "|[km]ph|kmh|rpm|[kMG]?Hz|[kM]?Wh?|[kM]?J|k?N|[kM]?Pa|[km]A|[km]?V|mol|k?cal|eV|[KkMGT]B|px|pts|[ap]m|[AP]M|st|nd|rd|th"
    "|deg|rad|dB|[CFK]|USD|EUR|GBP|INR|Rs"
)
LENGTH = re.compile("[cdkm]?m|in|ft|yd|mi|s")  # may have a power
BETWEEN = re.compile("an?|of|per|in|by|to|at|or|and|the")  # words of a unit
VARIABLES = re.compile("[abcd]{3}|[wxyz]{3}|[pqrst]{3}|[kmn]{3}")


def is_unit(unit: str, apart: bool) -> bool:
    """Whether what stands behind a number is a unit. In `2k`, `3x^2`, `6ab` and `2 sin x` it is not.

    `apart`: a space stands between the two. Letters are known symbols, or words long enough not to be variables.
    """
    if not re.match(f"[{LETTER}.]", unit):
        return True
    bare, power, _ = re.split(r"(\s*\^|$)", unit, maxsplit=1)
    parts = [part.replace(".", "") for part in re.split(r"[ /*-]", bare)]
    named = [bool(SYMBOL.fullmatch(part)) or _word(part, apart or i > 0) for i, part in enumerate(parts)]
    fit = any(named) and all(n or BETWEEN.fullmatch(part) for n, part in zip(named, parts, strict=True))
    return fit and (not power or bool(LENGTH.fullmatch(parts[-1])) or len(parts[-1]) > 3)


def _word(part: str, apart: bool) -> bool:
    """Whether letters are a word, and neither a function nor variables that are multiplied."""
    if re.search("[A-Za-zÀ-ɏ]", part):
        return len(part) >= (3 if apart else 4) and not FUNCTIONS.fullmatch(part) and not VARIABLES.fullmatch(part)
    return len(part) >= 2 or apart or not re.search("[Ѐ-ӿ]", part)


def number_of(text: str) -> Fraction | None:
    """The number that the whole text is, a unit behind it aside; None if it is not one."""
    text = plain(text)
    if len(text) > MOST_DIGITS:
        return None
    found = NUMBER.fullmatch(REPEATING.sub(_repeating, text))
    if not found:
        return None
    part = found.groupdict()
    unit = part["unit"] or ""
    if not is_unit(unit, found.group()[: found.start("unit")].endswith(" ")):
        return None
    power = next((g for g in (part["e"], found[found.re.groupindex["e"] + 1]) if g), "0").replace(" ", "")
    if abs(int(power)) > MOST_DIGITS:
        return None
    try:
        if part["top"]:
            value = _fraction(part["top"]) / _fraction(part["bottom"])
        else:
            value = _fraction(part["value"]) / _fraction(part["over"] or "1") * Fraction(10) ** int(power)
    except ZeroDivisionError:
        return None
    value += int(part["mixed"] or 0)
    if multiple := MULTIPLE.match(re.sub(WORDING, r"\1", unit).strip()):
        value *= 10 ** TENS[(multiple.lastindex or 1) - 1]
    return -value if (part["sign"] == "-") != (part["inner"] == "-") else value


def _fraction(text: str) -> Fraction:
    return Fraction(Decimal(text.strip("{} \t\n")))


def _repeating(found: re.Match[str]) -> str:
    """0.1666..., written with a bar over the 6, as a fraction."""
    first, repeated = found[1] + found[2], found[3]
    top = int(first + repeated) - int(first or "0")
    return f"\\frac{{{top}}}{{{10 ** len(found[2]) * (10 ** len(repeated) - 1)}}}"


def _western(text: str) -> str:
    """The text with India's numbers without commas, and 1.234.567 without points."""
    return POINTS.sub(
        lambda found: found[0].replace(".", ""), INDIAN.sub(lambda found: found[0].replace(",", ""), text)
    )


def one_number(text: str) -> Fraction | None:
    """The number that a text gives: all of it, a side of an equation, or the only one of a sentence; else None."""
    bare = re.sub(r"^\s*(?:\\approx|=|≈|~)", "", re.sub(WORDING, r"\1", plain(text)))
    for whole in (text, re.sub(WORDING, " ", text), _western(text), bare, re.sub(r"^\s*\((.*)\)\s*$", r"\1", bare)):
        if (value := number_of(whole)) is not None:
            return value
    sides = re.split(r"=|\\approx", plain(text))
    values = {value for side in sides if (value := number_of(side)) is not None}
    names = r"\s*(?:[A-Za-z]+(?:_\{?\w+\}?)?|(?:[\d\s+*/().-]|\\times|\\cdot)+)\s*"
    if len(sides) > 1 and len(values) == 1 and all(re.fullmatch(names, s) or number_of(s) is not None for s in sides):
        return values.pop()
    # A sentence with one number has it; in `2k+2`, `3:4` or (3, 4) nobody could say which.
    found = numbers_in(text)
    words = re.fullmatch(r"(?:[A-Za-z'\"]{2,}[,:.]?\s+)+(?:is |= ?)?\S*\d\S*(?:\s+[A-Za-z]{2,})*", text.strip())
    return found[0] if words and len(found) == 1 else None


IN_TEXT = re.compile(
    # A minus behind a number, a bracket or a letter takes away; behind a word ("it is -3") it is a sign.
    r"(?:(?<![\w)\]}])(?:(?<![\w)\]}] )-\s?|(?<![\d)\]}] )(?<!\b[A-Za-z] )-))?"
    rf"(?:{MONEY}\s?)?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)?"
    r"(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+(?!\w)|/\d+(?!\.?\d))?"
)
MIXED = re.compile(r"(?<![\d.,/])(\d{1,3})\s+(?=(\d{1,3})/(\d{1,3})(?!\.?\d))\2/\3")


def numbers_in(text: str) -> list[Fraction]:
    """The numbers in a text, thousands' commas and fractions a/b understood."""
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009'’_](?=\d{3}(?!\d))", "", _western(text))
    text = re.sub(rf"(?<=\d) ?{POWER}", r"e\1", typeset(text))
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[!,])\s?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[dtc]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r" \1\2/\3\4", text)
    text = MIXED.sub(lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", text)
    text = re.sub(r"(?<=[A-Za-z])\}?\s?\^\{?-?\d\}?", " ", text)  # the power of a unit is no number
    found = []
    for match in IN_TEXT.finditer(text):
        above, _, below = re.sub(rf"{MONEY}|[,\s\\]", "", match.group()).partition("/")
        try:
            value = Decimal(above)
            if abs(value.adjusted()) <= 10 * MOST_DIGITS:
                found.append(Fraction(value) / Fraction(int(below or 1)))
        except (InvalidOperation, ZeroDivisionError, ValueError):  # ValueError: more digits than `int` reads
            continue
    return found


def gold_number(gold: Any) -> Fraction | None:
    """The number that a column's value is, or the one behind its last `####`; None if there is none, or several."""
    gold = gold.item() if hasattr(gold, "item") else gold
    if gold is None or isinstance(gold, bool):
        return None
    marked = MARKED.findall(str(gold))
    return marked_number(marked[-1]) if marked else one_number(boxed(str(gold)) or str(gold))


def marked_number(text: str) -> Fraction | None:
    """The number that stands behind `####`: the first, where there are several; None in a formula such as `2+3`."""
    whole, found = one_number(text), numbers_in(text)
    formula = re.search(rf"\d(?:\s*[+*^]\s*[\w(]|\s?-\s?[\d(]|[{LETTER}])", text)
    return whole if whole is not None or not found or formula else found[0]


# ---- Whether an answer is right: by its text where that decides, else by math-verify ----

REASON = r"\b(?:because|since|as|so|for|which)\b"
CHOICE = re.compile(
    r"(?i)\W*(?:option|choice|answer)?\W*\b([A-J])\b"
    r"(\s*[).:\]].*|\s+(?:is|would be|must be)\s+(?:the\s+)?(?:correct|right|best|true)\b.*|\W*)"
    rf"(?:,?\s*{REASON}.*)?",
    re.DOTALL,
)
SENTENCE = re.compile(rf"(?<=[^\s.])\.\s+(?=[A-Z$\\(])|,?\s+{REASON}")  # ends what is said to be the answer
CLAUSE = re.compile(r",\s(?=(?:it|they|he|she|we|you|this|that|there)\b)")  # may end it too
OTHERS = re.compile(r"(?:\b(?:and|or)\b|[,/&])\s*\(?[A-J]\b(?! is\b)|(?<!\w)\(?[A-J][).:\]]")
BASE = re.compile(r"(-?[0-9A-Fa-f]+)(?:_\{?(\d+)\}?)?")
NO_SUM = re.compile(r"\d+(?:-\d+)+|\d{1,2}/\d{1,2}/\d{4}|\d{4}/\d{1,2}/\d{1,2}")  # ranges, dates, telephone numbers
RANGE = re.compile(r"(\d+)\s*(?:\\text\s*\{)?\s*(?:to|-)\s*\}?\s*(\d+)")
RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+(?:\s*[ap]\.?m\.?)?", re.IGNORECASE)
CLOCK = re.compile(r"([\d.:]+)([ap]?)\.?m?\.?", re.IGNORECASE)
FUNCTIONS = re.compile("(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|sqrt|log|exp|abs|pi|ln|inf(?:inity)?", re.IGNORECASE)


def words_of(text: str) -> list[str] | None:
    r"""The words that a text is, in small letters, parts of a list in order; None for mathematics."""
    bare = re.sub(WORDING, r" \1 ", plain(text))
    wrapped = bare != plain(text)
    bare = " ".join(bare.replace("-", " ").strip(" .,;:!?()[]'\"*").split())
    if not re.fullmatch(r"[^\W\d_]+(?:[ ,'&]+[^\W\d_]+)*", bare):
        return None
    parts = [p for p in re.split(r"[ ,&]+", bare.casefold()) if p not in ("a", "an", "the", "and")]
    if not wrapped and (len(bare) < 3 or FUNCTIONS.fullmatch(bare)) and bare.casefold() not in ("no", "up"):
        return None
    return sorted(parts) if "," in bare or " and " in bare else parts or [bare.casefold()]


def letter_of(gold: str) -> str | None:
    """The letter that a gold is, as in (B); None for any other."""
    letter = re.fullmatch(r"\(?([A-J])\)?", re.sub(WORDING, r"\1", plain(gold)))
    return letter and letter[1]


def chosen(text: str) -> str | None:
    """The letter that a text chooses; None if it names none, or several."""
    found = CHOICE.fullmatch(re.sub(WORDING, r"\1", plain(text)))
    if found is None or OTHERS.search(re.split(rf"(?i){REASON}", found[2], maxsplit=1)[0]):
        return None
    return found[1].upper()


def same_text(gold: str, answer: str) -> bool | None:
    """Whether two texts say the same; None where only mathematics can tell."""
    one, other = plain(gold), plain(answer)
    squeezed = [re.sub(WORDING, r"\1", t).replace(" ", "") for t in (one, other)]
    if squeezed[0] == squeezed[1]:
        return True
    if letter := letter_of(gold):
        return chosen(answer) == letter
    words = words_of(gold)
    if words is not None:
        return words == words_of(answer)
    if NO_SUM.fullmatch(one):
        parts = [re.split(r"([-/])", text) for text in (one, RANGE.sub(r"\1-\2", other))]
        return len({tuple(part.strip().lstrip("0") for part in each) for each in parts}) == 1
    if RATIO.fullmatch(one):
        mine, theirs = (CLOCK.fullmatch(text) for text in squeezed)
        if not mine or not theirs or mine[1] != theirs[1]:
            return False
        half = {found[2].casefold() for found in (mine, theirs) if found[2]}
        return len(half) < 2  # of a day, which need not be said
    if "_" in one and (base := BASE.fullmatch(one)):
        found = BASE.fullmatch(squeezed[1])
        return found is not None and found[1] == base[1] and found[2] in (None, base[2])
    numbers = tuple(n if (n := number_of(t)) is not None else number_of(_western(t)) for t in (gold, answer))
    if (numbers[0] is None) != (numbers[1] is None) and any(re.fullmatch(r"-?[\d.]+\s*[a-z]", t) for t in (one, other)):
        return False  # math-verify takes some variables for units: 3 for 3t
    if None not in numbers:
        # "2.5 million" is 2500000 and, where only one of the two says it, 2.5.
        said, bare = [MULTIPLE.search(t) for t in (one, other)], [number_of(MULTIPLE.sub("", t)) for t in (one, other)]
        if numbers[0] == numbers[1] or (bare[0] == bare[1] and None in said):
            units = {unit for t in (one, other) if (unit := _measure(t))}
            return len(units) < 2 or units == {("m", "1"), ("min", "1")}
        percents = ["%" in t for t in (one, other)]
        return None if any(percents) or "." in one + other else False
    return None


MEASURES = (
    "ms,millisecond s,sec,second min,minute h,hr,hour day,d week,wk month year,yr mm,millimeter,millimetre "
    "cm,centimeter,centimetre dm m,meter,metre km,kilometer,kilometre in,inch,inches ft,foot,feet yd,yard mi,mile "
    "mg,milligram g,gram kg,kilogram lb,pound oz,ounce ml,milliliter,millilitre l,liter,litre cent dollar,usd euro,eur "
    "celsius,\\circc fahrenheit,\\circf"
)
KNOWN = {f"{name}{s}": one.split(",")[0] for one in MEASURES.split() for name in one.split(",") for s in ("", "s")}
"""Units that have one name each, so that two of them differ."""


def _measure(text: str) -> tuple[str, str] | None:
    """The known unit behind a number, and its power."""
    found = NUMBER.fullmatch(text)
    bare = re.sub(WORDING, r" \1 ", found["unit"] or "").lower() if found else ""
    bare = " ".join(re.sub(r"[{}]|\^(?=\\)", "", bare.replace("\\degree", "\\circ")).split()).replace("circ ", "circ")
    unit = re.fullmatch(r"(?:(square|sq) |(cubic|cu) )?([\\a-z]+?)(?: ?\^ ?(\d))?", bare)
    if unit is None or unit[3] not in KNOWN:
        return None
    return KNOWN[unit[3]], unit[4] or ("2" if unit[1] else "3" if unit[2] else "1")


def intervals(text: str) -> str:
    """Inequalities joined by "or", and sets that inequalities build, as intervals; any other text as it is."""
    built = re.fullmatch(r"\\\{\s*\w\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|\||:)(.*)\\\}", text)
    plainer = re.sub(r"\\leq?(?![a-z])|<=", "≤", re.sub(r"\\geq?(?![a-z])|>=", "≥", built[1] if built else text))
    parts = re.split(r"\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\bor\b|\\lor|\\vee", plainer)
    found = [re.fullmatch(r"(?:([^<>≤≥]+)([<≤]))?\s*[a-z]\s*([<≤>≥])([^<>≤≥]+)", part.strip()) for part in parts]
    if not built and len(parts) == 1:
        return text
    made = []
    for one in found:
        if one is None or (one[1] and one[3] in ">≥"):
            return text
        low = f"{'[' if one[2] == '≤' else '('}{one[1]}" if one[1] else "(-\\infty"
        up = one[3] in "<≤"
        right, left = f"{one[4]}{']' if one[3] == '≤' else ')'}", f"{'[' if one[3] == '≥' else '('}{one[4]}"
        made.append(f"{low},{right}" if up else f"{left},\\infty)")
    return "\\cup ".join(made)


def latex(text: str) -> str:
    """The text as mathematics that math-verify reads: units, `\\pm` and Python's notation written out."""
    text = intervals(plain(text))
    if (value := number_of(text)) is not None and "%" not in text:
        exact = value.denominator == 1
        return str(value) if exact else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    text = re.sub(r",?\s*\\(?:text|mbox|mathrm)\s*\{\s*(?:or|and)\s*\}|(?<=[\w)}\]]),? (?:or|and) (?=\S)", ",", text)
    text = re.sub(r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}", text)
    text = re.sub(r"^([-\d./\s]+)=\s*([A-Za-z])$", r"\2=\1", text)
    text = re.sub(rf"(?<=[\d}}])\s*{WORDING}(?:\s*\^\{{?\d\}}?)?\s*$", "", text)
    if "\\" not in text:
        while (match := re.search(r"\bsqrt\(([^()]*)\)", text)) is not None:
            text = f"{text[: match.start()]}\\sqrt{{{match[1]}}}{text[match.end() :]}"
        text = text.replace("**", "^").replace("*", " \\cdot ")
        text = re.sub(r"(?<![A-Za-z])(pi|infty|sin|cos|tan|log|ln)\b", r"\\\1 ", text)
        text = re.sub(r"\boo\b|(?i:\binf(?:inity)?\b)", r"\\infty ", text)
    parts = re.fullmatch(r"([^,]*)\\pm([^,]*)", text)
    return f"{parts[1]}+{parts[2]},{parts[1]}-{parts[2]}" if parts else text


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    # Time-outs by signals would hide a hang of compiled code; `main` ends the process instead.
    return list(parse(text, parsing_timeout=None))


def _sympy(found: list[Any]) -> bool:
    return any(not isinstance(one, str) for one in found)


def gold_of(text: str) -> str:
    """What a column's text gives as the answer: all of it or, of a whole solution, what is marked, boxed or said."""
    found = [MARKED.findall(text)[-1:], [boxed(text) or ""], TAGGED.findall(text)[-1:], SAID.findall(text)[-1:]]
    return next((part[0] for part in found if part and part[0].strip()), text)


def alternatives(gold: str) -> list[str]:
    """The letter and the text of a gold that is a choice with its text, as in "(C) 12"; else the gold."""
    bare = re.sub(WORDING, r"\1", plain(gold))
    choice = re.fullmatch(r"\(([A-J])\)\s*((?:\\frac|\\sqrt|\\?\$|-?\d|[A-Za-z]{2}).*)", bare)
    return [choice[1], choice[2]] if choice else [gold]


def readable(gold: str) -> bool:
    """Whether `math` understands a gold: a number, words, or what math-verify reads."""
    gold = gold_of(gold)
    if number_of(gold) is not None or words_of(gold) is not None or same_text(gold, "?") is False:
        return True
    return _sympy(_parsed(f"$\\boxed{{{latex(gold)}}}$"))


def math_equal(golds: Sequence[str], completion: str) -> bool | None:
    """Whether the completion's last answer is one of the golds; None if no gold can be read."""
    found = [_equal(each, completion) for gold in golds for each in alternatives(gold_of(gold))]
    return None if all(one is None for one in found) else any(found)


def _equal(gold: str, completion: str) -> bool | None:
    completion = concluded(completion, gold)
    tagged = TAGGED.findall(completion)
    completion = tagged[-1] if tagged else completion
    box, marked = boxed(completion), MARKED.findall(completion)
    answer = box if box is not None else marked[-1] if marked else None
    if answer is not None:
        answer = (SAID.findall(re.sub(WORDING, r"\1", answer)) or [answer])[-1]
        return bool(answer.strip()) and _same(gold, answer, f"$\\boxed{{{latex(answer)}}}$")
    # Nothing marks it: what is said to be the answer, all of it, or what math-verify finds.
    said = SAID.findall(completion)
    last = said[-1] if said else completion
    first = SENTENCE.split(last, maxsplit=1)[0] if said else completion
    clause = CLAUSE.split(first, maxsplit=1)[0] if said else first
    if number_of(clause) is not None or (words_of(gold) is not None and words_of(clause) is not None):
        first = clause
    if said and number_of(first) is not None and same_text(gold, first) is False:
        return False  # another unit is another answer, though the numbers are equal
    known = bool(same_text(gold, last))
    if (said or tagged) and not known and not letter_of(gold):
        known = bool(_same(gold, first, f"$\\boxed{{{latex(first)}}}$"))
    if known or words_of(gold) is not None:
        return known
    return _same(gold, None, typeset(first if re.search(r"[\d$\\]", first) else completion))


def _same(gold: str, answer: str | None, text: str) -> bool | None:
    """Whether gold and answer are equal, the answer for math-verify being `text`; None if the gold cannot be read."""
    from math_verify import verify

    decided = None if answer is None else same_text(gold, answer)
    if decided is not None:
        return decided
    golds, found = _parsed(f"$\\boxed{{{latex(gold)}}}$"), _parsed(text)
    if not _sympy(golds):
        return None
    equal = _sympy(found) and verify(golds, found, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(equal) and not _differ(golds, found)


def _differ(golds: list[Any], found: list[Any]) -> bool:
    """Whether numbers that are equal after six digits behind the point differ: tiny ones all seem equal there."""
    for one, other in product(golds, found):
        if getattr(one, "is_number", False) and getattr(other, "is_number", False):
            try:
                return bool(0 < abs(one.evalf()) < 1e-4 and abs((other / one).evalf() - 1) > 1e-5)
            except TypeError:  # what sympy cannot compare: a percentage
                continue
    return False


def matches(pattern: str, flags: int, whole: bool, text: str) -> bool:
    """Whether a pattern matches all of a text, or is found in it."""
    compiled = re.compile(pattern, flags)
    return (compiled.fullmatch(text) if whole else compiled.search(text)) is not None


# ---- The process: requests are done by a copy of it, which is ended when one takes too long ----

TASKS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (math_equal, readable, matches)}


def work(link: Any, task: str, other: Any) -> None:
    """Answer the requests that come over the link, once what the task needs is loaded. `other` is its other end."""
    with suppress(OSError, AttributeError):  # Linux: killed with the process that it is a copy of, which may be killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if task != "matches":
        _parsed("$1$")
    other.close()  # else it would never see that the process which it is a copy of has ended
    link.send(None)
    while True:
        try:
            answer = {"value": TASKS[task](*link.recv())}
        except EOFError:
            return
        except Exception as error:  # whatever a library raises: it is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        link.send(answer)


def end_with(parent: int) -> None:
    """End this process, and its copy with it, when the one that started it has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(0.5)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(1)


def main(task: str, parent: int) -> None:
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    if task != "matches":
        _parsed("$1$")  # before the copies are made, which start at once then
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    process: Any = None
    link: Any = None
    for line in sys.stdin:
        arguments, seconds = json.loads(line)
        if process is None:
            link, other = context.Pipe()
            process = context.Process(target=work, args=(other, task, link), daemon=True)
            process.start()
            other.close()
            link.recv()  # it is ready: starting does not count
        try:
            link.send(arguments)
            answer = link.recv() if link.poll(seconds) else {"timeout": seconds}
        except (EOFError, OSError):
            answer = {"error": f"the process for {task} died"}
        if "value" not in answer and not answer.get("error", "").startswith("re."):
            process.kill()
            process.join()
            process = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
