"""The commands `serving keys ...`: API keys, tenants and their limits."""

from __future__ import annotations

import typing
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from serving.errors import SettingsError
from serving.router.access.keys_file import KeysFile, make_key, read_keys, write_keys
from serving.settings.tenants import Priority, Tenant

app = typer.Typer(
    help="API keys and the limits of the tenants behind them, in a file that `router.keys_file` names.\n\n"
    "A tenant is a group of clients with one budget and one set of limits; it may have several keys. Start with\n\n"
    "    serving keys create --file keys.yaml --tenant acme --rpm 600 --concurrent 32\n\n"
    "which prints a key for the client (`Authorization: Bearer sk-...`). Only its salted hash is stored, so a lost key "
    "cannot be shown again: create a new one and revoke the old one. Running routers reload the file when it changes.",
    no_args_is_help=True,
)

FileOption = Annotated[Path, typer.Option("--file", "-f", help="The keys file; `create` creates it if it is missing.")]
RpmOption = Annotated[int | None, typer.Option("--rpm", min=0, help="Requests per minute; 0 for no limit.")]
TpmOption = Annotated[
    int | None, typer.Option("--tpm", min=0, help="Tokens per minute, of prompts and answers; 0 for no limit.")
]
ConcurrentOption = Annotated[
    int | None, typer.Option("--concurrent", min=0, help="Requests at once, of each kind; 0 for no limit.")
]
PriorityOption = Annotated[
    Priority | None, typer.Option("--priority", help="Whose waiting requests go first when replicas are busy.")
]
ModelsOption = Annotated[
    str | None, typer.Option("--models", help="Names of models it may use, with commas between; `all` for every one.")
]
BudgetOption = Annotated[
    float | None, typer.Option("--budget", min=-1, help="US dollars per calendar month (UTC); -1 for no limit.")
]


@app.command()
def create(
    file: FileOption,
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Whose key it is; a new one is made with the limits.")],
    name: Annotated[str, typer.Option("--name", help="A note for the list: where the key is used.")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="Also lets its holder use the admin endpoints.")] = False,
    expires: Annotated[int | None, typer.Option("--expires", min=1, help="Days until the key ends.")] = None,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    concurrent: ConcurrentOption = None,
    priority: PriorityOption = None,
    models: ModelsOption = None,
    budget: BudgetOption = None,
) -> None:
    """Create a key and print it; it is shown only once. The given limits apply to its tenant, existing or new."""
    now = datetime.now(UTC).replace(microsecond=0)
    given = _limits(rpm, tpm, concurrent, priority, models, budget)

    def change(content: KeysFile) -> tuple[KeysFile, str]:
        ends = now + timedelta(days=expires) if expires is not None else None
        text, record = make_key(tenant, created=now, name=name, is_admin=admin, expires=ends)
        tenants = {**content.tenants, tenant: _changed(content.tenants.get(tenant, Tenant()), given)}
        return KeysFile(tenants=tenants, keys=(*content.keys, record)), text

    key = _edit(file, change, may_make=True)
    typer.echo(f"This key is shown once; {file} keeps only its hash.", err=True)
    typer.echo(key)


@app.command("list")
def list_keys(file: FileOption) -> None:
    """List tenants with their limits and the ids of their keys."""
    content = _read(file)
    now_s = datetime.now(UTC).timestamp()
    for name, tenant in content.tenants.items():
        limits = tenant.model_dump(mode="json", exclude_defaults=True)
        shown = ", ".join(f"{key}={_show(value)}" for key, value in limits.items()) or "no limits"
        typer.echo(f"{name}: {shown}")
        for key in content.keys:
            if key.tenant == name:
                ends = (
                    f"  {'expired' if key.is_expired(now_s) else 'expires'} {key.expires:%Y-%m-%d}"
                    if key.expires
                    else ""
                )
                admin = "  admin" if key.is_admin else ""
                typer.echo(f"  {key.id}  {key.created:%Y-%m-%d}{ends}{admin}  {key.name}".rstrip())


@app.command()
def revoke(
    file: FileOption, key_id: Annotated[str, typer.Argument(metavar="ID", help="See `serving keys list`.")]
) -> None:
    """Revoke a key. Running routers refuse it as soon as they have reloaded the file."""

    def change(content: KeysFile) -> tuple[KeysFile, None]:
        kept = tuple(key for key in content.keys if key.id != key_id)
        if len(kept) == len(content.keys):
            _refuse(f"{file}: there is no key with this id; `serving keys list` shows those that there are")
        return KeysFile(tenants=content.tenants, keys=kept), None

    _edit(file, change)
    typer.echo(f"{key_id} is revoked.")


@app.command("tenant")
def change_tenant(
    file: FileOption,
    tenant: Annotated[str, typer.Argument(help="Its name.")],
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    concurrent: ConcurrentOption = None,
    priority: PriorityOption = None,
    models: ModelsOption = None,
    budget: BudgetOption = None,
) -> None:
    """Change the limits of a tenant. Limits that are not given are unchanged."""
    given = _limits(rpm, tpm, concurrent, priority, models, budget)
    if not given:
        _refuse("give at least one limit to change; see --help")

    def change(content: KeysFile) -> tuple[KeysFile, Tenant]:
        if tenant not in content.tenants:
            _refuse(f"{file}: there is no tenant {tenant!r}; `serving keys create --tenant` makes one")
        changed = _changed(content.tenants[tenant], given)
        return KeysFile(tenants={**content.tenants, tenant: changed}, keys=content.keys), changed

    changed = _edit(file, change)
    limits = changed.model_dump(mode="json", exclude_defaults=True)
    typer.echo(f"{tenant}: {', '.join(f'{key}={_show(value)}' for key, value in limits.items()) or 'no limits'}")


def _limits(
    rpm: int | None,
    tpm: int | None,
    concurrent: int | None,
    priority: Priority | None,
    models: str | None,
    budget: float | None,
) -> dict[str, Any]:
    """Return the given fields of the tenant. On the command line 0 (for money, a negative number) and `all` mean no
    limit."""
    given: dict[str, Any] = {}
    for field, count in (("requests_per_minute", rpm), ("tokens_per_minute", tpm), ("max_concurrent", concurrent)):
        if count is not None:
            given[field] = count or None
    if priority is not None:
        given["priority"] = priority
    if models is not None:
        given["models"] = None if models == "all" else tuple(name.strip() for name in models.split(","))
    if budget is not None:
        given["monthly_budget"] = None if budget < 0 else Decimal(str(budget))
    return given


def _changed(tenant: Tenant, given: dict[str, Any]) -> Tenant:
    return Tenant.model_validate({**tenant.model_dump(), **given})


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


Result = typing.TypeVar("Result")


def _edit(file: Path, change: Callable[[KeysFile], tuple[KeysFile, Result]], *, may_make: bool = False) -> Result:
    """Read, change and write the keys file. An error ends the command with its message."""
    content = KeysFile() if may_make and not file.exists() else _read(file)
    try:
        changed, result = change(content)
        write_keys(file, changed)
    except ValidationError as error:
        item = error.errors(include_input=False)[0]
        _refuse(f"{'.'.join(map(str, item['loc']))}: {item['msg']}")
    except SettingsError as error:
        _refuse(str(error))
    return result


def _read(file: Path) -> KeysFile:
    try:
        return read_keys(file)
    except SettingsError as error:
        _refuse(str(error))


def _refuse(reason: str) -> typing.NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(2)
