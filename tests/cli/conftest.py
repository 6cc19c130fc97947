import pytest


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """Commands silence the bars of the libraries for their process; other tests get them back."""
    from datasets.utils import enable_progress_bars
    from transformers.utils import logging

    yield
    enable_progress_bars()
    logging.enable_progress_bar()
