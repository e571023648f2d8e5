"""Requests that Gradio cannot understand, answered in one sentence.

Its routes suppose names, types and numbers that a program need not send, and fail with whatever Python raises about
them. None of the page's own code runs there: that runs in the queue, and says itself what is wrong (`running`).
"""

import json
import logging

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

NOT_UNDERSTOOD = "the request is not understood; /gradio_api/info lists what can be called, and with what"
_MISUNDERSTOOD = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def refusing(app: ASGIApp) -> ASGIApp:
    """The page with status 400 for requests that it cannot understand, or an error as the end of their stream.

    Other errors stay what they are.
    """

    async def refused(scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, sending)
        except _MISUNDERSTOOD as error:
            if begun or scope["type"] != "http":
                raise
            _note(scope, error)
            await JSONResponse({"detail": NOT_UNDERSTOOD}, 400)(scope, receive, send)
        except RuntimeError as error:  # a stream has begun before Gradio looks up whose it is
            if not (begun and isinstance(error.__cause__, HTTPException)):
                raise
            _note(scope, error.__cause__)
            last = f"event: error\ndata: {json.dumps('there is no such event')}\n\n"
            await send({"type": "http.response.body", "body": last.encode(), "more_body": False})

    return refused


def _note(scope: Scope, error: Exception) -> None:
    _log.warning("a request was not understood: %s %r: %s", scope["method"], scope["path"], type(error).__name__)
