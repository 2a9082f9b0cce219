"""What tests of the doctor's checks ask of findings."""

from collections.abc import Iterator

from redux_server.cli.doctor.findings import Finding, Level


def levels(findings: Iterator[Finding]) -> dict[str, Level]:
    return {finding.subject: finding.level for finding in findings}


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding
