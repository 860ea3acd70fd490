"""Small helpers that LLaVA's servers and scripts import: logging, quick model construction, moderation.

Evaluation and pruning do not use them. Only `violates_moderation` uses the network, and only with an API key
in the environment.
"""

import json
import logging
import logging.handlers
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

from llava.constants import LOGDIR

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."

_MODERATION_URL = "https://api.openai.com/v1/moderations"


def build_logger(logger_name: str, logger_filename: str, logdir: str | Path = LOGDIR) -> logging.Logger:
    """Make a logger that writes to standard error and to `logdir/logger_filename`, a new file each day.

    A second call with the same names returns the same logger and does not duplicate its lines.
    """
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    path = Path(logdir, logger_filename).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    form = logging.Formatter(line, datefmt="%Y-%m-%d %H:%M:%S")
    if not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        console = logging.StreamHandler()
        console.setFormatter(form)
        logger.addHandler(console)
    if not any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        rotating = logging.handlers.TimedRotatingFileHandler
        file = rotating(path, when="D", utc=True, encoding="utf-8", delay=True)
        file.setFormatter(form)
        logger.addHandler(file)
    return logger


class StreamToLogger:
    """A writable stream that sends whole lines to a logger: `sys.stdout = StreamToLogger(logger)`."""

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.logger = logger
        self.log_level = log_level
        self.terminal = sys.stdout
        self.linebuf = ""

    def __getattr__(self, name: str) -> Any:
        # Only what is not defined here: isatty, encoding, fileno ... of the replaced stream.
        return getattr(self.__dict__["terminal"], name)

    def write(self, text: str) -> int:
        *lines, self.linebuf = (self.linebuf + text).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())
        return len(text)

    def flush(self) -> None:
        if self.linebuf:
            self.logger.log(self.log_level, self.linebuf.rstrip())
        self.linebuf = ""


def disable_torch_init() -> None:
    """Make `torch.nn.Linear` and `LayerNorm` skip their random initialization, for the rest of the process.

    LLaVA's scripts call it before loading, because the weights that are read replace the initial ones.
    `load_pretrained_model` does not need it.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None


def pretty_print_semaphore(semaphore: Any) -> str:
    """Format an asyncio semaphore for a log line."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def violates_moderation(text: str) -> bool:
    """Return whether OpenAI's moderation service flags `text`.

    Without OPENAI_API_KEY the result is False and no request is sent. If the service cannot be reached, the
    result is False with a warning, so that a demo page keeps working.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        return False
    request = urllib.request.Request(
        _MODERATION_URL,
        data=json.dumps({"input": text}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(json.load(answer)["results"][0]["flagged"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        logging.getLogger(__name__).warning("The moderation service gave no answer: %s", error)
        return False
