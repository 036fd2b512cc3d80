"""Geometry on the unit sphere: points, great-circle polygons, their areas and intersections.

Points are Cartesian unit vectors, so that poles and the date line are places like any other.
"""

from __future__ import annotations

import numpy as np

#: Below this length of the cross product of its ends (in radians) an edge is a point and bounds nothing.
SHORTEST_EDGE = 1e-11


def wrapped(longitude: np.ndarray) -> np.ndarray:
    """Return longitudes, or differences of them, in degrees in [-180, 180)."""
    return (longitude + 180.0) % 360.0 - 180.0


def unit_vectors(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Return unit vectors, shape (..., 3), of positions in degrees."""
    phi, lam = np.radians(np.asarray(latitude, dtype=float)), np.radians(np.asarray(longitude, dtype=float))
    cosine = np.cos(phi)
    return np.stack([cosine * np.cos(lam), cosine * np.sin(lam), np.broadcast_to(np.sin(phi), np.shape(cosine * lam))], -1)


def positions(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return latitude and longitude in degrees of vectors of any length but zero, shape (..., 3)."""
    x, y, z = np.moveaxis(vectors, -1, 0)
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length one; the zero vector stays."""
    length = np.sqrt((vectors * vectors).sum(-1, keepdims=True))
    return np.asarray(vectors / np.where(length > 0, length, 1.0))


def tangents(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two unit vectors, shape (n, 3), that span the plane that touches the sphere at each point (n, 3).

    Away from the poles they point east and north.
    """
    axis = np.where(np.abs(points[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    one = normalised(np.cross(axis, points))
    return one, np.cross(points, one)


def great_circle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the angle in radians between unit vectors, accurate for small and large ones."""
    return np.asarray(2 * np.arcsin(np.minimum(np.linalg.norm(a - b, axis=-1) / 2, 1.0)))


def polygon_areas(polygons: np.ndarray) -> np.ndarray:
    """Return signed areas in steradians of great-circle polygons, positive where counterclockwise from outside.

    Parameters
    ----------
    polygons
        Vertices, shape (n, k, 3), on the unit sphere; repeated vertices add nothing. Each must fit in a hemisphere.

    Notes
    -----
    A fan of triangles, each by the formula of Van Oosterom and Strackee (1983, IEEE Trans. Biomed. Eng. 30, 125-126, eq. 8). The
    triple product is taken of differences, without which small cells would lose half of their digits.
    """
    first = polygons[:, :1]
    b, c = polygons[:, 1:-1], polygons[:, 2:]
    triple = (first * np.cross(b - first, c - first)).sum(-1)
    below = 1.0 + (first * b).sum(-1) + (b * c).sum(-1) + (c * first).sum(-1)
    return np.asarray(2.0 * np.arctan2(triple, below).sum(-1))


def counterclockwise(polygons: np.ndarray) -> np.ndarray:
    """Return the polygons with their vertices in counterclockwise order."""
    return np.where((polygon_areas(polygons) < 0)[:, None, None], polygons[:, ::-1], polygons)


def clip(subjects: np.ndarray, clippers: np.ndarray) -> np.ndarray:
    """Return the intersections of pairs of great-circle polygons, one pair per row.

    Parameters
    ----------
    subjects
        Vertices, shape (n, k, 3), counterclockwise; where a subject is not convex the result may hold edges of no width.
    clippers
        Vertices, shape (n, m, 3), counterclockwise and convex.

    Returns
    -------
    numpy.ndarray
        Shape (n, K, 3), padded by repeating the first vertex; all vertices equal where two polygons do not overlap.

    References
    ----------
    Sutherland, I. E. and Hodgman, G. W. (1974), Reentrant polygon clipping, Commun. ACM 17, 32-42; with planes through the
    centre of the sphere as edges.
    """
    out, count = np.array(subjects, dtype=float), np.full(len(subjects), subjects.shape[1])
    for e in range(clippers.shape[1]):
        start, end = clippers[:, e], clippers[:, (e + 1) % clippers.shape[1]]
        normal = np.cross(start, end - start)
        length = np.linalg.norm(normal, axis=-1, keepdims=True)
        normal = np.where(length > SHORTEST_EDGE, normal / np.where(length > 0, length, 1.0), 0.0)
        out, count = _half_space(out, count, normal)
    return out


def _half_space(polygons: np.ndarray, count: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut polygons (n, k, 3), of which the first `count` vertices are real, by the side of `normal` (n, 3)."""
    n, k, _ = polygons.shape
    real = np.arange(k) < count[:, None]
    following = np.where((np.arange(k) == count[:, None] - 1)[..., None], polygons[:, :1], np.roll(polygons, -1, axis=1))
    height = np.einsum("nkc,nc->nk", polygons, normal)
    after = np.einsum("nkc,nc->nk", following, normal)
    inside, then = height >= 0, after >= 0
    crossing = real & (inside != then)
    span = np.where(crossing, height - after, 1.0)
    cut = normalised((height[..., None] * following - after[..., None] * polygons) * np.sign(span)[..., None])
    slots = np.empty((n, 2 * k, 3))
    slots[:, 0::2], slots[:, 1::2] = polygons, cut
    keep = np.empty((n, 2 * k), dtype=bool)
    keep[:, 0::2], keep[:, 1::2] = real & inside, crossing
    left = keep.sum(1)
    order = np.argsort(~keep, axis=1, kind="stable")[:, : max(int(left.max(initial=0)), 3)]
    out = np.take_along_axis(slots, order[..., None], axis=1)
    padding = np.arange(out.shape[1]) >= left[:, None]
    first = np.where((left > 0)[:, None], out[:, 0], slots[:, 0])
    return np.where(padding[..., None], first[:, None], out), left
