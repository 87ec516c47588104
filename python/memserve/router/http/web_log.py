"""What aiohttp may log of the requests it reads. Knows no requests."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError


class _OursOnly(logging.Filter):
    """Leaves out what clients have sent that is no HTTP: nothing has failed here, and aiohttp would log it
    with a traceback and with the bytes, which may well have a key in them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def web_logger() -> logging.Logger:
    """For aiohttp's servers."""
    logger = logging.getLogger(__name__)
    if not logger.filters:
        logger.addFilter(_OursOnly())
    return logger
