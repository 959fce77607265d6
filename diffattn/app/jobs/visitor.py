"""Who asks for a job, as far as the page can tell."""

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Visitor:
    """One open page, the browser it is open in, and where that browser is.

    A client can invent sessions and obtain any number of names, but has only one address.
    """

    session: Hashable  # of one open page, named by the client: what Stop applies to
    name: Hashable | None  # of the browser, signed by the server; None: it has shown none
    owner: Hashable  # the user who has logged in, otherwise the network address
    tab: str = ""  # of the open page, each with a Stop of its own

    @classmethod
    def of(cls, session: "Hashable | Visitor") -> "Visitor":
        """A visitor as it is; anything else is a session on its own."""
        return session if isinstance(session, Visitor) else cls(session, session, session)
