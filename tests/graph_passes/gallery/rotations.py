"""Spellings of rotary embedding as small programs of x [B, 4, T, 6] and positions [B, T]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Program = Callable[[Tensor, Tensor], Tensor]
"""From x [B, 4, T, 6] and position int64 [B, T] to the turned x."""

HEAD_DIM, LONGEST, THETA = 6, 64, 10000.0

SPELLINGS: dict[str, tuple[Program, int]] = {}
"""Name to program and the attribute `interleaved` of what is one rotation."""

REFUSED: dict[str, tuple[Program, str]] = {}
"""Name to program and the reason, as a regular expression."""


def spelling(name: str, interleaved: int = 0) -> Callable[[Program], Program]:
    """Adds a program that is a rotation."""

    def add(program: Program) -> Program:
        assert name not in SPELLINGS
        SPELLINGS[name] = (program, interleaved)
        return program

    return add


def refused(name: str, reason: str) -> Callable[[Program], Program]:
    """Adds a program that is none, or none that can be told."""

    def add(program: Program) -> Program:
        assert name not in REFUSED
        REFUSED[name] = (program, reason)
        return program

    return add


def frequencies(head_dim: int = HEAD_DIM) -> Tensor:
    """θ^(−2i/D), [D/2]."""
    return 1.0 / THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def angles(position: Tensor) -> Tensor:
    """[B, T, D/2]."""
    return position[:, :, None].float() * frequencies()


def rotate_half(x: Tensor) -> Tensor:
    """[−high, low]."""
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_every_two(x: Tensor) -> Tensor:
    """[−x1, x0, −x3, x2, …]."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@spelling("as the reference has it")
def reference(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x[..., :3], x[..., 3:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@spelling("as transformers has it: tables joined with themselves, scaled, unsqueezed")
def huggingface(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)
    cos, sin = (wide.cos() * 1.0).unsqueeze(1), (wide.sin() * 1.0).unsqueeze(1)
    return x * cos + rotate_half(x) * sin


@spelling("tables scaled for a longer context")
def attention_scaling(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)
    return x * (wide.cos() * 1.2)[:, None] + rotate_half(x) * (wide.sin() * 1.2)[:, None]


@spelling("factors and terms the other way round")
def swapped(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)
    return wide.sin()[:, None] * rotate_half(x) + wide.cos()[:, None] * x


@spelling("halves by chunk, the sign on the table")
def chunked(x: Tensor, position: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    cos, sin = angles(position)[:, None].cos(), angles(position)[:, None].sin()
    return torch.cat((low * cos + high * -sin, low * sin + high * cos), -1)


@spelling("halves by tensor_split, minus the negated half")
def negated(x: Tensor, position: Tensor) -> Tensor:
    low, high = torch.tensor_split(x, 2, -1)
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)[:, None]
    return x * wide.cos() - torch.cat((high, -low), -1) * wide.sin()


@spelling("halves on an axis of their own")
def stacked_halves(x: Tensor, position: Tensor) -> Tensor:
    B, H, T, D = x.shape
    pairs = x.view(B, H, T, 2, D // 2)
    cos, sin = angles(position)[:, None].cos(), angles(position)[:, None].sin()
    low, high = pairs[:, :, :, 0], pairs[:, :, :, 1]
    return torch.stack((low * cos - high * sin, high * cos + low * sin), 3).reshape(B, H, T, D)


@spelling("neighbours by stride, stacked and flattened", interleaved=1)
def strided(x: Tensor, position: Tensor) -> Tensor:
    cos, sin = angles(position)[:, None].cos(), angles(position)[:, None].sin()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@spelling("neighbours by reshape and unbind", interleaved=1)
def unbound(x: Tensor, position: Tensor) -> Tensor:
    even, odd = x.reshape(*x.shape[:-1], 3, 2).unbind(-1)
    cos, sin = angles(position)[:, None].cos(), angles(position)[:, None].sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(x.shape)


@spelling("neighbours with repeated tables", interleaved=1)
def every_two(x: Tensor, position: Tensor) -> Tensor:
    wide = angles(position).repeat_interleave(2, -1)[:, None]
    return x * wide.cos() + rotate_every_two(x) * wide.sin()


@spelling("complex pairs of neighbours", interleaved=1)
def complex_pairs(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)[:, None]
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 3, 2))
    return torch.view_as_real(pairs * turn).flatten(3)


@spelling("complex pairs before the heads come to the front, as mistral-inference has it", interleaved=1)
def complex_before_transpose(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)[:, :, None]  # before polar: the exporter has no complex unsqueeze
    turn = torch.polar(torch.ones_like(angle), angle)
    early = x.transpose(1, 2)  # stands for the projection's own layout
    pairs = torch.view_as_complex(early.reshape(*early.shape[:-1], 3, 2))
    return torch.view_as_real(pairs * turn).flatten(3).transpose(1, 2)


@spelling("before the heads come to the front")
def before_transpose(x: Tensor, position: Tensor) -> Tensor:
    early = x.transpose(1, 2)
    cos, sin = angles(position)[:, :, None].cos(), angles(position)[:, :, None].sin()
    low, high = early[..., :3], early[..., 3:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).transpose(1, 2)


@spelling("tables kept from construction, looked up by position")
def cached_half(x: Tensor, position: Tensor) -> Tensor:
    table = torch.arange(LONGEST, dtype=torch.float32)[:, None] * frequencies()
    cos, sin = table.cos()[position][:, None], table.sin()[position][:, None]
    low, high = x[..., :3], x[..., 3:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@spelling("wide tables kept from construction")
def cached_wide(x: Tensor, position: Tensor) -> Tensor:
    table = torch.arange(LONGEST, dtype=torch.float32)[:, None] * frequencies()
    wide = torch.cat((table, table), -1)
    cos, sin = F.embedding(position, wide.cos())[:, None], F.embedding(position, wide.sin())[:, None]
    return x * cos + rotate_half(x) * sin


@spelling("cosine and sine in one table")
def one_table(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    cos, sin = torch.cat((angle.cos(), angle.sin()), -1)[:, None].chunk(2, -1)
    low, high = x[..., :3], x[..., 3:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@refused("only the first elements of a head are turned", r"only 4 of the 6 elements of a head are turned")
def partial(x: Tensor, position: Tensor) -> Tensor:
    angle = position[:, :, None].float() * frequencies(4)
    turned, rest = x[..., :4], x[..., 4:]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = turned[..., :2], turned[..., 2:]
    return torch.cat((torch.cat((low * cos - high * sin, high * cos + low * sin), -1), rest), -1)


@refused("the other direction", r"it turns in the other direction")
def backwards(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)[:, None]
    return x * wide.cos() - rotate_half(x) * wide.sin()


@refused("halves that turn by different angles", r"tables .*: its parts turn by different angles|halves are equal")
def two_angles(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, 2 * angle), -1)[:, None]
    return x * wide.cos() + rotate_half(x) * wide.sin()


@refused("x is scaled by itself in between", r"multiplied or divided by what is itself made of x")
def normalised_inside(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)[:, None]
    return x * x * wide.cos() + rotate_half(x) * wide.sin()


@refused("the position is added and not turned", r"is joined or added to it, but is not made of the same x")
def added(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)[:, None]
    return x * wide.cos() + wide.sin()


@refused("reflected instead of turned", r"bilinear form of x and two tables, but not the rotation")
def reflected(x: Tensor, position: Tensor) -> Tensor:
    angle = angles(position)
    wide = torch.cat((angle, angle), -1)[:, None]
    return x * wide.cos() + torch.cat((x[..., 3:], x[..., :3]), -1) * wide.sin()


@refused("two axes, each with half of the head", r"turned by these angles|different angles|not the rotation")
def axial(x: Tensor, position: Tensor) -> Tensor:
    angle = position[:, :, None].float() * frequencies(2)
    row, column = angle, angle * 3
    parts = []
    for part, turn in ((x[..., :2], row), (x[..., 2:4], column)):
        cos, sin = turn.cos()[:, None], turn.sin()[:, None]
        parts.append(
            torch.cat((part[..., :1] * cos - part[..., 1:] * sin, part[..., 1:] * cos + part[..., :1] * sin), -1)
        )
    return torch.cat((*parts, x[..., 4:]), -1)
