"""What a command sets before torch and transformers are imported: their threads' manners, and no bars of their own."""

from __future__ import annotations

import os
import warnings


def hush() -> None:
    """No bars for loading and writing weights, and no warnings of transformers about itself.

    Threads sleep at barriers: those that spin cost minutes where the cores are shared.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging

    logging.disable_progress_bar()
