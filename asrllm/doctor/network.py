"""Hosts of a DeepSpeed hostfile, and environment variables of distributed training."""

import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from asrllm.doctor.findings import Finding, ok, problem, warning
from asrllm.errors import UserError
from asrllm.launchers import non_negative_integer
from asrllm.text_files import read_text

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# variables that switch off a fast path between GPUs or nodes
SLOW_SETTINGS = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE")
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
HOST_LINE = re.compile(r"(\S+)\s+slots=\d+")  # the same pattern as DeepSpeed's


# --- hostfile ---


def check_hostfile(path: Path) -> list[Finding]:
    """Check the form of a DeepSpeed hostfile, and that the name of each host resolves.

    Raises:
        UserError: the file cannot be read.
    """
    findings = []
    hosts: list[str] = []
    for number, line in enumerate(read_text(path, "--hostfile").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = HOST_LINE.fullmatch(text)
        if found is None:
            what = f"{path}:{number} is {text!r}, not a host and its number of GPUs"
            findings.append(problem("hostfile", what, "Write 'HOST slots=N'."))
        else:
            hosts.append(found[1])
    if not hosts and not findings:
        what = f"the hostfile {str(path)!r} names no host"
        findings.append(problem("hostfile", what, "Write a line 'HOST slots=N' for each host."))
    for host, count in Counter(hosts).items():
        if count > 1:
            what = f"the hostfile {str(path)!r} names {host!r} {count} times"
            findings.append(problem("hostfile", what, "Leave one line for it."))
        findings.append(check_host(host))
    return findings


def check_host(host: str) -> Finding:
    """Check that the name of a host resolves."""
    try:
        address = resolve(host)
    except UserError as error:
        fix = "Correct the name, or add it to /etc/hosts or DNS."
        return problem("host", str(error), fix)
    return ok("host", f"the host {host!r} has the address {address}")


def resolve(host: str) -> str:
    """Return the first address of a host.

    Raises:
        UserError: its name does not resolve.
    """
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the name of the host {host!r} does not resolve ({reason})") from error


# --- environment ---


def check_environment(environment: Mapping[str, str]) -> list[Finding]:
    """Check variables of launchers, NCCL and gloo that an earlier job may have left over."""
    findings = [
        *check_launcher_variables(environment),
        *check_interfaces(environment),
        *check_slow_settings(environment),
    ]
    others = sorted(name for name in environment if name.startswith(("NCCL_", "GLOO_")))
    reported = {finding.check for finding in findings}
    values = [f"{name}={environment[name]!r}" for name in others if name not in reported]
    if values:
        findings.append(ok("environment", f"set in the environment: {', '.join(values)}"))
    elif not findings:
        findings.append(
            ok("environment", "no variable of a launcher, NCCL or gloo is set in the environment")
        )
    return findings


def check_launcher_variables(environment: Mapping[str, str]) -> list[Finding]:
    """Check the variables by which a launcher places a process among the others of a run."""
    present = [name for name in LAUNCHER_VARIABLES if name in environment]
    if not present:
        return []
    values = ", ".join(f"{name}={environment[name]!r}" for name in present)
    fix = f"Run 'unset {' '.join(present)}', unless a launcher has set them."
    try:
        size = non_negative_integer(environment, "WORLD_SIZE", 1)
    except UserError:
        return [problem("launcher", f"{values}: WORLD_SIZE is not a non-negative integer", fix)]
    if size != 1:
        text = f"{values}: a process waits for {size} processes, which no launcher starts"
        return [problem("launcher", text, fix)]
    return [warning("launcher", f"the environment has {values}", fix)]


def check_interfaces(environment: Mapping[str, str]) -> list[Finding]:
    """Check that the network interfaces which NCCL and gloo must use exist on this machine."""
    present = [name for _, name in socket.if_nameindex()]
    findings = []
    for variable in INTERFACE_VARIABLES:
        wanted = environment.get(variable, "")
        if not wanted or has_interface(wanted, present, exact=variable.startswith("GLOO")):
            continue
        text = f"{variable}={wanted!r} matches no network interface of this machine"
        fix = f"Unset it, or use one of: {', '.join(present)}."
        findings.append(problem(variable, text, fix))
    return findings


def has_interface(wanted: str, present: Sequence[str], *, exact: bool) -> bool:
    """Return whether a machine has an interface that a variable asks for.

    Args:
        wanted: value of the variable: names separated by commas. NCCL takes the names as prefixes,
            after "=" as exact names, and after "^" as those that it must not use.
        present: interfaces of the machine.
        exact: whether the names are exact without "=", as for gloo.
    """
    is_excluding = wanted.startswith("^") and not exact
    names = wanted.lstrip("^")
    is_exact = exact or names.startswith("=")
    listed = tuple(names.lstrip("=").split(","))
    if is_exact:
        matching = [name for name in present if name in listed]
    else:
        matching = [name for name in present if name.startswith(listed)]
    if is_excluding:
        return len(matching) < len(present)
    return bool(matching)


def check_slow_settings(environment: Mapping[str, str]) -> list[Finding]:
    """Warn of variables that make NCCL slower."""
    findings = []
    for name in SLOW_SETTINGS:
        if environment.get(name, "0") not in ("", "0"):
            text = f"{name}={environment[name]!r} makes communication between GPUs slower"
            fix = f"Run 'unset {name}', unless this machine needs it."
            findings.append(warning(name, text, fix))
    return findings
