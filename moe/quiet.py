"""Silences advice of third parties that a user of the command line can do nothing about."""

from __future__ import annotations

import logging
import warnings


def quiet_third_party() -> None:
    """Filter known noise for the rest of the process; called by the command, never by the library.

    Must run before Megatron is first imported. Errors are not touched.
    """
    # Transformer Engine and Apex are optional and absent, and fusions are off on purpose.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # repeats the configs that it reads
    # DeepSpeed sets the level of its logger itself, and warns of a machine without CUDA.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # Names of torch that Megatron and its optimizer still use.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\..*")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
