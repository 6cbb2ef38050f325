import pytest

from moe.data.split import Document, drop_overlap, is_heldout

N = 13


def words(start, count):
    return " ".join(f"w{n}" for n in range(start, start + count))


def grams(text):
    parts = text.split()
    return {tuple(parts[i : i + N]) for i in range(len(parts) - N + 1)}


def test_about_five_percent_of_names_are_held_out():
    held = sum(is_heldout(f"module_{n}.py") for n in range(10_000))
    assert 400 < held < 600


def test_split_of_a_name_never_changes():
    # Written down, so that another Python or machine that splits otherwise is noticed.
    assert [
        name for name in ("abc.py", "turtle.py", "statistics.py", "json/decoder.py") if is_heldout(name)
    ] == [
        "turtle.py",
        "statistics.py",
    ]


def test_a_document_without_overlap_stays_whole():
    document = Document("a", words(0, 30) + "\n" + words(30, 5))
    assert drop_overlap([document], [Document("b", words(100, 500))]) == [document]


def test_a_shared_run_of_13_words_is_cut_and_12_are_not():
    text = "\n".join([words(0, 20), words(20, 20), words(40, 20)])
    twelve, thirteen = words(22, 12), words(22, 13)
    assert drop_overlap([Document("a", text)], [Document("b", twelve)])[0].text == text
    pieces = drop_overlap([Document("a", text)], [Document("b", thirteen)])
    assert [(piece.name, piece.text) for piece in pieces] == [
        ("a#1", words(0, 20) + "\n"),
        ("a#2", words(40, 20)),
    ]


@pytest.mark.parametrize("start", range(0, 40, 7))
def test_a_run_across_lines_is_found_wherever_it_lies(start):
    held = Document("a", "\n".join(words(n, 5) for n in range(0, 60, 5)))
    train = Document("b", "x\n" + words(start, 14).replace(" ", "\n  ") + " y")
    left = drop_overlap([held], [train])
    assert left
    for piece in left:
        assert not grams(piece.text) & grams(train.text)


def test_no_run_arises_across_a_cut():
    # Without the middle line, the outer two would read as the training text.
    held = Document("a", "\n".join([words(0, 13), words(500, 13), words(13, 13)]))
    train = [Document("b", words(500, 13)), Document("c", words(6, 13))]
    left = drop_overlap([held], train)
    assert [piece.text for piece in left] == [words(0, 13) + "\n", words(13, 13)]


def test_pieces_too_short_to_compare_are_dropped():
    assert drop_overlap([Document("a", words(0, 12))], []) == []
    assert drop_overlap([], [Document("b", words(0, 20))]) == []


def test_japanese_is_compared_without_spaces():
    sentence = "設定ファイルを編集してからサービスを再起動すると変更が反映されます。"
    other = "別の内容の文章であり、ここには同じ並びの言葉は一つも現れないはずなので残ります。"
    held = Document("a", f"{sentence}\n{other}\n")
    left = drop_overlap([held], [Document("b", f"まず{sentence}次に")])
    assert [piece.text for piece in left] == [f"{other}\n"]
