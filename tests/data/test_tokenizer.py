import json

import numpy as np
import pytest

from moe.data.tokenizer import Tokenizer, train_byte_bpe
from moe.errors import InputError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "日本語の文章です。🙂 naïve café\r\n\t",
    "",
    "a <|endoftext|> b",
    "\x00\ufeff",
]
CORPUS = [f"def function_{n}(argument):\n    return argument + {n}\n" for n in range(200)] + TEXTS


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_byte_bpe(CORPUS, 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe, byte_tokenizer):
    return bpe if request.param == "bpe" else byte_tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_sum_to_the_length_of_the_text(tokenizer, text):
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts.dtype == np.int32
    assert counts[tokenizer.encode(text)].sum() == len(text.encode())
    assert counts[tokenizer.eod] == 0


def test_text_cannot_spell_the_end_of_document(tokenizer):
    ids = tokenizer.encode("one<|endoftext|>two")
    assert tokenizer.eod not in ids
    assert max(ids) < tokenizer.vocab_size


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_bytes_has_257_ids(byte_tokenizer):
    assert (byte_tokenizer.vocab_size, byte_tokenizer.eod) == (257, 256)
    assert byte_tokenizer.encode("é") == [0xC3, 0xA9]


def test_incomplete_character_decodes_to_the_replacement_sign(byte_tokenizer):
    assert byte_tokenizer.decode([0xC3, 256, 0x61]) == "\ufffda"


def test_training_is_deterministic_and_reaches_the_size(bpe, tmp_path):
    again = train_byte_bpe(iter(CORPUS), 300, tmp_path / "again.json")
    assert again.fingerprint == bpe.fingerprint
    assert again.vocab_size == 300
    assert train_byte_bpe(CORPUS, 299, tmp_path / "smaller.json").fingerprint != bpe.fingerprint


def test_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    with pytest.raises(InputError, match="256"):
        train_byte_bpe(CORPUS, 256, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_fingerprint_ignores_formatting_of_the_file(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    train_byte_bpe(CORPUS, 300, path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert Tokenizer.load(path).fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"a": 1}', "not a Hugging Face tokenizer"),
        (b"[]", "tokenizer"),
    ],
)
def test_broken_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


def test_absent_file_is_refused_with_the_alternatives(tmp_path):
    with pytest.raises(InputError, match='give "bytes"'):
        Tokenizer.load(tmp_path / "absent.json")


def _write_tokenizer(path, build):
    """Write a tokenizer.json that `build` changes after a word-level one is made."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    build(backend, tokenizers)
    backend.save(str(path))
    return path


def test_file_without_end_of_document_token_is_refused(tmp_path):
    path = _write_tokenizer(tmp_path / "tokenizer.json", lambda backend, library: None)
    with pytest.raises(InputError, match=r"<\|endoftext\|>, <\|end_of_text\|>, </s>"):
        Tokenizer.load(path)


def test_token_bytes_of_another_kind_of_vocabulary_is_refused(tmp_path):
    path = _write_tokenizer(
        tmp_path / "tokenizer.json", lambda backend, library: backend.add_special_tokens(["</s>"])
    )
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eod == 2
    with pytest.raises(InputError, match="neither byte-level nor SentencePiece"):
        tokenizer.token_bytes()


def test_sentencepiece_bytes_count_the_space_before_a_document(tmp_path):
    import tokenizers

    pieces = {
        "<unk>": 0,
        "</s>": 1,
        **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)},
        "▁": 258,
        "b": 259,
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()]
    )
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("b日 b")
    assert tokenizer.token_bytes()[ids].sum() == 1 + len("b日 b".encode())
    assert tokenizer.token_bytes()[tokenizer.eod] == 0


def test_truncation_and_template_of_the_file_do_not_apply(tmp_path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    train_byte_bpe(CORPUS, 300, path)
    plain = Tokenizer.load(path).encode(CORPUS[0])
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(3)
    backend.enable_padding(length=500)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(path))
    assert Tokenizer.load(path).encode(CORPUS[0]) == plain
