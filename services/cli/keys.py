"""`penstock keys create`, `list` and `revoke`: who may use a mesh that asks for API keys."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from core.errors import InvalidInput
from services.cli import console
from services.common import audit
from services.common.data_folder import STORE_NAME, default_data_folder
from services.common.keys import SCOPES, ApiKey, KeyLimits, draw_key, hash_secret

if TYPE_CHECKING:
    from services.common.store import Store

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = typer.Typer(help="Makes, lists and revokes API keys.", rich_markup_mode=None)

Limit = int | None


@app.command()
def create(
    *,
    tenant: Annotated[
        str,
        typer.Option(help="Whose key it is: tenants share a mesh fairly, and share no caches."),
    ],
    scopes: Annotated[
        str, typer.Option(help=f"What it is for, with commas: of {', '.join(SCOPES)}.")
    ] = ",".join(SCOPES),
    models: Annotated[
        str, typer.Option(help="Models that it may use, with commas. Default: all.")
    ] = "",
    expires: Annotated[
        str | None, typer.Option(help="When it ends, from now: 90d, 12h. Default: never.")
    ] = None,
    max_streams: Annotated[
        Limit, typer.Option(help="Most requests that are answered at a time, by each gateway.")
    ] = None,
    tokens_per_minute: Annotated[
        Limit, typer.Option(help="Most tokens of prompts and answers in a minute, likewise.")
    ] = None,
    max_prompt_tokens: Annotated[
        Limit, typer.Option(help="Most tokens of a request's prompt.")
    ] = None,
    max_output_tokens: Annotated[
        Limit, typer.Option(help="Most tokens of a request's answer.")
    ] = None,
    max_priority: Annotated[
        int, typer.Option(help="The highest class that requests may ask for; 0 is the ordinary.")
    ] = 0,
) -> None:
    """Makes a key and shows it: this once, since only a hash of it is kept."""
    now_s = time.time()
    text = draw_key()
    key = ApiKey(
        key_id=text.key_id,
        tenant=tenant,
        secret_hash=hash_secret(text.secret),
        created_at_s=now_s,
        scopes=frozenset(_names(scopes)),
        models=frozenset(_names(models)),
        expires_at_s=None if expires is None else now_s + _parse_duration_s(expires),
        limits=KeyLimits(
            max_streams=max_streams,
            tokens_per_minute=tokens_per_minute,
            max_prompt_tokens=max_prompt_tokens,
            max_output_tokens=max_output_tokens,
            max_priority=max_priority,
        ),
    )
    audit.record("key created", key_id=key.key_id, tenant=tenant, scopes=scopes, models=models)
    _store().add_key(key)
    console.say(str(text))
    console.say("It is not shown again; `penstock keys list` shows all but it.", to=console.err)


@app.command("list")
def show() -> None:
    """Shows all keys, those that have ended too, without their secrets."""
    table = Table("id", "tenant", "state", "scopes", "models", "limits", "created", "expires")
    table.box = None
    now_s = time.time()
    for key in _store().all_keys():
        cells = [key.key_id, key.tenant, key.state(now_s), ", ".join(sorted(key.scopes))]
        cells += [", ".join(sorted(key.models)) or "all", _describe(key.limits)]
        cells += [_date(key.created_at_s), _date(key.expires_at_s)]
        table.add_row(*map(Text, cells))
    console.out.print(table)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The id, as `list` shows it.")]) -> None:
    """Ends a key for good; gateways refuse it within a second. Requests under way go on."""
    key = _store().revoke_key(key_id, now_s=time.time())
    audit.record("key revoked", key_id=key_id, tenant=key.tenant)
    console.say(f"key {key_id} of {key.tenant} is revoked")


def _store() -> Store:
    # Here, since SQLAlchemy takes time that other commands need not take.
    from services.common.store import Store

    return Store(default_data_folder() / STORE_NAME)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _parse_duration_s(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None:
        raise InvalidInput("expires", text, "a time from now such as 90d, 12h, 30m or 10s")
    return float(int(match[1]) * _UNITS_S[match[2]])


def _describe(limits: KeyLimits) -> str:
    shown = {name: value for name, value in vars(limits).items() if value}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "none"


def _date(time_s: float | None) -> str:
    return "-" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M")
