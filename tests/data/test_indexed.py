import numpy as np
import pytest

from moe.data.indexed import bin_path, idx_path, indexed_writer


def _documents(vocab_size):
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, size).tolist() for size in (1, 100, 63, 1, 4096)]


@pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 200_000])
def test_megatron_reads_back_every_id(tmp_path, vocab_size):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = _documents(vocab_size)
    with indexed_writer(tmp_path / "set.v1", vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
    dataset = IndexedDataset(str(tmp_path / "set.v1"))
    assert [dataset[n].tolist() for n in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("vocab_size", [257, 200_000])
def test_files_equal_those_of_megatrons_builder(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=DType.optimal_dtype(vocab_size))
    with indexed_writer(ours, vocab_size) as writer:
        for ids in _documents(vocab_size):
            writer.add_document(ids)
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(idx_path(theirs)))
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()


def test_id_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(OverflowError), indexed_writer(tmp_path / "set", 257) as writer:
        writer.add_document([1, 2])
        writer.add_document([70_000])
    assert not list(tmp_path.iterdir())
