"""Names that may hold anything, where they are shown and written."""

import pytest

from crosskd_hf.commands.errors import explain
from crosskd_hf.data.errors import Kind, Problems
from crosskd_hf.inference.image_files import picture_names
from crosskd_hf.studies.data_report import _table
from crosskd_hf.training.metric_table import format_metrics
from crosskd_hf.utils.escaping import file_name, markdown, markdown_block, markdown_code, printable, printable_lines
from crosskd_hf.utils.plots import bars, new_figure
from crosskd_hf.utils.progress import say

HOSTILE = "a\x1b[31m\nb\u202egpj\udcff"  # colour, a line break, text turned round, a byte that is no UTF-8
SHOWN = r"a\x1b[31m\nb\u202egpj\udcff"


@pytest.mark.parametrize(
    "name",
    ["cat", "Ampel (gelb)", "träfik ljus", "日本\u3000語", "a\xa0b", "C:\\x", "🐈", "می\u200cشود", "👩\u200d👧"],
)
def test_what_is_seen_stays(name):
    assert printable(name) == name


def test_what_is_not_seen_is_escaped():
    assert printable(HOSTILE) == SHOWN
    assert printable("\u200e\u200f\u2066\u2069") == r"\u200e\u200f\u2066\u2069"
    assert printable("\u200b\u2028\x7f\x9b\t") == r"\u200b\u2028\x7f\x9b\t"
    assert printable_lines("a\n\tb\x1b\r") == "a\n\tb\\x1b\\r"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("cat.png", "cat.png"),
        ("train[:80%]", "train[:80%]"),
        ("../../etc", ".._.._etc"),
        ("..", "__"),
        ("", "_"),
        ("a\\b/c\0d", "a_b_c_d"),
        ("a\x1b[31m\u202e.png", "a_[31m_.png"),
    ],
)
def test_file_names_are_of_one_file(name, written):
    assert file_name(name) == written


def test_markdown_shows_the_text():
    assert markdown("<img src=x> [a](b) | `c` *d*\n# e") == r"&lt;img src=x&gt; \[a\](b) \| \`c\` \*d\*\\n# e"
    assert markdown_code("a`<b>`\n") == r"`a'<b>'\n`"
    assert markdown_block("a\n", "yaml") == "```yaml\na\n```"
    assert markdown_block("a\n ```\n<b>\x1b\n", "yaml") == "````yaml\na\n ```\n<b>\\x1b\n````"


def test_pictures_get_names_of_their_own():
    names = ["a\x1b.png", "a_.png", "b\n/..x.bmp", "c\\d.jpg", "e.png"]
    assert picture_names(names) == ["a_.png.png", "a_.png", "b_/..x.bmp.png", "c_d.jpg", "e.png"]


def test_reports_and_terminals_get_names_escaped(capsys):
    problems = Problems()
    problems.add(Kind.IMAGE, HOSTILE)
    say(f"{HOSTILE} is read")
    texts = [*problems.lines(), *_table({HOSTILE: 3}), *format_metrics({f"AP/{HOSTILE}": 0.5}).splitlines()[2:]]
    assert [SHOWN in text for text in texts] == [True] * 3
    for text in (capsys.readouterr().out, explain(ValueError(HOSTILE))):
        assert SHOWN.split(r"\n")[0] in text and SHOWN.split(r"\n")[1] in text and "\x1b" not in text


def test_charts_show_names_and_no_formulas():
    figure = new_figure(2, 2)
    bars(figure, (1, 1, 1), r"$\nonsense$", {r"$\wrong{$": 1, "a\n": 2, r"a\n": 3})
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [r"\$\wrong{\$", r"a\n", r"a\n"]
