"""Programs for energy.node_command that print what a machine draws, as `6512.5 W`.

    python -m moe.metering.node_readers redfish https://BMC/redfish/v1/Chassis/1/Power
    python -m moe.metering.node_readers ipmi

`redfish` reads the one address that it is given, through no proxy and after no redirect: the resource Power
(PowerControl) or EnvironmentMetrics (PowerWatts) of a chassis, DMTF DSP0268. Credentials come from the entry
of that host in the user's .netrc and go over https alone; `--ca FILE` names the BMC's certificate. `ipmi`
runs `ipmitool dcmi power reading`. Both end within the time that the meter allows.
"""

from __future__ import annotations

import argparse
import base64
import json
import netrc
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 8.0


class ReaderError(Exception):
    """What kept the power from being read."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an HTTP error: the credentials are for the one host that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def main(argv: list[str] | None = None) -> int:
    """Print the power of the machine; 1, with the reason on stderr, where it cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    redfish = kinds.add_parser("redfish")
    redfish.add_argument("url")
    redfish.add_argument("--ca", help="PEM file of the BMC's certificate or its authority")
    kinds.add_parser("ipmi")
    args = parser.parse_args(argv)
    try:
        power_w = redfish_w(args.url, args.ca) if args.kind == "redfish" else ipmi_w()
    except ReaderError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{power_w:g} W\n")
    return 0


def redfish_w(url: str, ca: str | None = None) -> float:
    """Watts of the chassis at a Redfish address. Raises ReaderError if there are none."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ReaderError(f"{url}: an address begins with https:// or http://")
    request = urllib.request.Request(url, headers=_authorization(url))  # noqa: S310 - scheme checked above
    try:
        tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect, tls)
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            resource = json.load(answer)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ReaderError(f"{url}: {error}") from error
    return _power_of(resource, url)


def ipmi_w() -> float:
    """Watts of this machine by IPMI DCMI. Raises ReaderError if there are none."""
    try:
        done = subprocess.run(
            ["ipmitool", "dcmi", "power", "reading"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ReaderError(f"ipmitool: {error}") from error
    match = re.search(r"Instantaneous power reading:\s*(\d+) Watts", done.stdout)
    if done.returncode != 0 or match is None:
        raise ReaderError(f"ipmitool gave no power: {(done.stderr or done.stdout).strip()[-200:]}")
    return float(match[1])


def _authorization(url: str) -> dict[str, str]:
    """Of the host's own entry; the default entry of a .netrc is meant for other servers."""
    parts = urlsplit(url)
    try:
        entry = netrc.netrc().hosts.get(parts.hostname or "")
    except FileNotFoundError:
        return {}
    except netrc.NetrcParseError as error:
        raise ReaderError(f".netrc: {error}") from error
    if entry is None:
        return {}
    if parts.scheme != "https":
        raise ReaderError(f"{url}: .netrc has a password for this host, which goes over https:// only")
    return {"Authorization": "Basic " + base64.b64encode(f"{entry[0]}:{entry[2]}".encode()).decode()}


def _power_of(resource: Any, url: str) -> float:
    """PowerControl is a list of supplies' groups, of which the first is the chassis."""
    try:
        if "PowerControl" in resource:
            return float(resource["PowerControl"][0]["PowerConsumedWatts"])
        return float(resource["PowerWatts"]["Reading"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ReaderError(
            f"{url} has neither PowerControl[0].PowerConsumedWatts nor PowerWatts.Reading"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
