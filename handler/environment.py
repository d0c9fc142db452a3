"""Variables of ours, told apart from those that Kubernetes and Docker make under our prefixes."""

import re
from collections.abc import Mapping

# What Kubernetes makes of a Service, and Docker of a link, that is called like the prefix of our
# settings. NAME_PORT is recognised by its value, because GATEWAY_PORT is a setting as well.
_SERVICE = re.compile(
    "[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    "|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile("(tcp|udp|sctp)://.+")
_LINK_NAME = re.compile("/[^/]+/[^/]+")


def platform_variables(environ: Mapping[str, str], *prefixes: str) -> list[str]:
    """Names under the prefixes that Kubernetes or Docker made, and that are no settings."""
    links = tuple(
        name.removesuffix("NAME") + "ENV_"
        for name, text in environ.items()
        if name.endswith("_NAME") and _LINK_NAME.fullmatch(text)
    )
    return [
        name
        for name, text in environ.items()
        if name.startswith(prefixes)
        and (
            _SERVICE.fullmatch(name)
            or (name.endswith("_PORT") and _SERVICE_URL.fullmatch(text))
            or (name.endswith("_NAME") and _LINK_NAME.fullmatch(text))
            or name.startswith(links)
        )
    ]


def own_variables(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The variables with a prefix of ours that somebody set as a setting."""
    foreign = platform_variables(environ, prefix)
    return {
        name: text
        for name, text in environ.items()
        if name.startswith(prefix) and name not in foreign
    }
