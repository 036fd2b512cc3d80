r"""The icosahedral multi-mesh on the sphere, and how a grid of points is tied to it.

After GraphCast (Lam et al. 2023, Science 382, 1416-1421, doi:10.1126/science.adi2336). An icosahedron is refined r times: each triangle becomes
four, with the middles of its edges pushed out to the sphere. That gives 10 4^r + 2 nodes, 20 4^r triangles and 30 4^r edges; the nodes
of a refinement are the first ones of the next. A *multi-mesh* has the edges of all refinements on the nodes of the last, so that a
message crosses the globe in a few steps.

The icosahedron stands on a triangle, not on a corner: the middle of a triangle lies over each pole. No node of any refinement is at a pole, where
east has no direction, and a turn by a third around the axis takes the mesh to itself.

Everything here is geometry on unit vectors, in numpy: neither the date line nor the poles are places apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from xgenda.spherical import normalised, unit_vectors

REACH = 0.6  # of the longest edge: within this distance of a point lies a node, as corners of a triangle are at most 0.577 from its middle
ASIDE = 1e-6  # of the longest edge
MOST = 8  # nodes within that distance of a point
PIECE = 2**16  # points that are looked up at once
LARGEST_REFINEMENT = 8  # 655,362 nodes


@dataclass(frozen=True, eq=False)
class Icosphere:
    """A refined icosahedron.

    Attributes
    ----------
    nodes
        Unit vectors, shape (10 4^r + 2, 3).
    faces
        Of each refinement 0 to r: corners of its triangles, counterclockwise from outside, shape (20 4^k, 3). Triangle f becomes 4 f to 4 f + 3.
    """

    nodes: np.ndarray
    faces: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, refinement: int) -> Icosphere:
        """Refine so many times."""
        nodes, faces = icosahedron()
        every = [faces]
        for _ in range(refinement):
            nodes, faces = _refined(nodes, faces)
            every.append(faces)
        return cls(nodes, tuple(every))

    def longest(self, refinement: int) -> float:
        """Return the length of the longest edge of a refinement, as a chord of the unit sphere."""
        return float(_lengths(self.nodes, undirected(self.faces[refinement])).max())

    def containing(self, points: np.ndarray) -> np.ndarray:
        """Return the corners of the triangle of the last refinement that holds each point, shape (n, 3).

        Found exactly, from the twenty triangles of the icosahedron down: the four parts of a triangle fill it.

        Parameters
        ----------
        points
            Vectors of any length but zero, shape (n, 3).
        """
        found = np.zeros(len(points), dtype=np.int64)
        for faces in self.faces:
            normals = _inward(self.nodes[faces])
            for a in range(0, len(points), PIECE):
                p = points[a : a + PIECE]
                if len(faces) == 20:
                    found[a : a + PIECE] = _least(np.einsum("pc,fkc->pfk", p, normals)).argmax(1)
                    continue
                four = 4 * found[a : a + PIECE, None] + np.arange(4)
                sides = _least(np.einsum("pc,pfkc->pfk", p, normals[four]))
                found[a : a + PIECE] = np.take_along_axis(four, sides.argmax(1)[:, None], 1)[:, 0]
        return np.asarray(self.faces[-1][found])


@dataclass(frozen=True, eq=False)
class GridMesh:
    """A multi-mesh tied to the points of a latitude-longitude grid.

    Attributes
    ----------
    nodes
        Latitude and longitude of the nodes in degrees, shape (m, 2): all of the sphere, or those around a regional grid.
    edges
        Sender and receiver of each directed edge of the multi-mesh, shape (2, e).
    edge_features
        Shape (e, 4), see `relative`.
    up
        Point and node of each edge from grid to mesh, sorted by point, shape (2, u).
    up_features, up_weights
        Shape (u, 4); shape (u,), the area of the cell, so that those of a node have the sum 1.
    down
        The three nodes around each point, shape (points, 3).
    down_features
        Shape (points, 3, 4).
    barycentric
        Of each point in its triangle, shape (points, 3).
    """

    nodes: np.ndarray
    edges: np.ndarray
    edge_features: np.ndarray
    up: np.ndarray
    up_features: np.ndarray
    up_weights: np.ndarray
    down: np.ndarray
    down_features: np.ndarray
    barycentric: np.ndarray

    @classmethod
    def of(cls, latitude: np.ndarray, longitude: np.ndarray, refinement: int, margin: float = 2.0) -> GridMesh:
        """Tie a mesh to a grid.

        Parameters
        ----------
        latitude, longitude
            Of rows and columns in degrees, shapes (ny,) and (nx,); both must be ascending.
        refinement
            Of the finest mesh.
        margin
            Nodes so many of the longest edges (of the finest mesh) around the points are kept, at least 1.
        """
        sphere = Icosphere.of(refinement)
        lat, lon = (c.ravel() for c in np.meshgrid(latitude, longitude, indexing="ij"))
        points = unit_vectors(lat, lon)
        frames = local_frames(lat, lon)
        pairs = [undirected(f) for f in sphere.faces]
        lengths = [float(_lengths(sphere.nodes, e).max()) for e in pairs]
        longest, whole = lengths[-1], lengths[0]
        # to the north-east of a point on an edge, whatever rounding says, so that places of a symmetric mesh are treated alike
        corners = sphere.containing(points + ASIDE * longest * (frames[:, 1] + 0.7 * frames[:, 2]))
        barycentric = _inside(points, sphere.nodes[corners])
        near, _ = cKDTree(points).query(sphere.nodes, distance_upper_bound=max(margin, 1.0) * longest)
        kept = np.isfinite(near)
        kept[corners] = True
        number = np.cumsum(kept) - 1
        nodes = sphere.nodes[kept]
        levels = [_both_ways(number[e[kept[e].all(1)]]) for e in pairs]
        where = np.degrees(np.stack([np.arcsin(np.clip(nodes[:, 2], -1, 1)), np.arctan2(nodes[:, 1], nodes[:, 0])], 1))
        theirs = local_frames(where[:, 0], where[:, 1])
        features = [
            relative(nodes[e[0]], nodes[e[1]], theirs[e[1]], unit, whole)
            for unit, e in zip(lengths, levels, strict=True)
            if e.size
        ]
        up = _near(points, nodes, REACH * longest)
        area = _cell_areas(latitude, longitude)[up[0]]
        total = np.zeros(len(nodes))
        np.add.at(total, up[1], area)
        down = number[corners]
        return cls(
            where, np.concatenate(levels, 1), np.concatenate(features), up,
            relative(points[up[0]], nodes[up[1]], theirs[up[1]], longest, longest), area / total[up[1]],
            down, relative(nodes[down], points[:, None], frames[:, None], longest, longest), barycentric,
        )  # fmt: skip


def icosahedron() -> tuple[np.ndarray, np.ndarray]:
    """Return the twelve corners, unit vectors, and the twenty triangles of an icosahedron that has the middle of a triangle over each pole."""
    golden = (1 + math.sqrt(5)) / 2
    corners = np.array([(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)])
    corners = np.concatenate([np.roll(corners, k, axis=1) for k in range(3)])
    near = np.isclose(np.linalg.norm(corners[:, None] - corners, axis=-1), 2.0)
    faces = np.array(
        [(a, b, c) for a in range(12) for b in range(a) for c in range(b) if near[a, b] and near[b, c] and near[a, c]]
    )
    inward = np.linalg.det(corners[faces]) < 0
    faces[inward] = faces[inward][:, ::-1]
    pole = normalised(corners[faces[0]].mean(0))
    front = corners[faces[0][0]]
    front = normalised(front - pole * (front @ pole))
    turned = normalised(corners) @ np.stack([front, np.cross(pole, front), pole], 1)
    return turned, faces


def undirected(faces: np.ndarray) -> np.ndarray:
    """Return each edge of some triangles once, shape (e, 2), the lower node first."""
    pairs = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return np.unique(pairs, axis=0)


def local_frames(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Return unit vectors up, east and north at places in degrees, shape (n, 3, 3); at a pole those of its meridian."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    up = unit_vectors(latitude, longitude)
    east = np.stack([-np.sin(lam), np.cos(lam), np.zeros_like(lam)], -1)
    north = np.stack([-np.sin(phi) * np.cos(lam), -np.sin(phi) * np.sin(lam), np.cos(phi)], -1)
    return np.stack([up, east, north], -2)


def relative(senders: np.ndarray, receivers: np.ndarray, frames: np.ndarray, unit: float, whole: float) -> np.ndarray:
    """Return the features of edges, shape (..., 4).

    Where the sender is, up, east and north of the receiver, in units of the longest edge of its kind; and the length as the number of halvings
    of `whole`, so that edges of all refinements can be told apart.
    """
    away = senders - receivers
    length = np.linalg.norm(away, axis=-1, keepdims=True)
    local = np.einsum("...kc,...c->...k", frames, away) / unit
    halvings = np.log2(whole / np.maximum(length, 2.0**-6 * unit))
    return np.concatenate([local, 0.25 * halvings], -1)


def suitable_refinement(latitude: np.ndarray, longitude: np.ndarray) -> int:
    """Return the finest refinement whose edges are at least two cells of a grid long, at the least one.

    Cells as they are in the middle of the grid: those of a whole globe at the equator. A quarter of a degree gives 6, as published, and one
    degree 4.
    """
    rows = np.abs(np.diff(latitude)).mean() if len(latitude) > 1 else 180.0
    middle = np.abs(latitude).min() if latitude.min() * latitude.max() > 0 else 0.0
    columns = np.abs(np.diff(longitude)).mean() * math.cos(math.radians(middle)) if len(longitude) > 1 else 360.0
    cell = max(min(rows, 90.0), min(columns, 90.0))
    return int(np.clip(math.floor(math.log2(63.435 / (2 * cell))), 1, LARGEST_REFINEMENT))


def _refined(nodes: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut each triangle into four."""
    pairs = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges, which = np.unique(pairs, axis=0, return_inverse=True)
    middles = normalised(nodes[edges].sum(1))
    ab, bc, ca = (which.reshape(-1, 3) + len(nodes)).T
    a, b, c = faces.T
    children = np.stack([np.stack(t, 1) for t in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))], 1)
    return np.concatenate([nodes, middles]), children.reshape(-1, 3)


def _inward(corners: np.ndarray) -> np.ndarray:
    """Return for each corner of triangles (f, 3, 3) the normal of the plane through the other two, positive towards it."""
    return np.cross(corners[:, [1, 2, 0]], corners[:, [2, 0, 1]])


def _inside(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return the barycentric weights of points in triangles (n, 3, 3)."""
    sides = np.einsum("pc,pkc->pk", points, _inward(corners))
    return np.asarray(sides / sides.sum(-1, keepdims=True))


def _least(sides: np.ndarray) -> np.ndarray:
    """Return the minimum over the last axis, of three."""
    return np.asarray(np.minimum(np.minimum(sides[..., 0], sides[..., 1]), sides[..., 2]))


def _lengths(nodes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(nodes[edges[:, 0]] - nodes[edges[:, 1]], axis=-1))


def _both_ways(edges: np.ndarray) -> np.ndarray:
    """Return senders and receivers, shape (2, 2 e)."""
    return np.asarray(np.concatenate([edges, edges[:, ::-1]]).T)


def _near(points: np.ndarray, nodes: np.ndarray, distance: float) -> np.ndarray:
    """Return points and the nodes within a distance of each, shape (2, u), sorted by point."""
    tree, parts = cKDTree(nodes), []
    for a in range(0, len(points), PIECE):
        found, which = tree.query(points[a : a + PIECE], k=min(MOST, len(nodes)), distance_upper_bound=distance)
        row, column = np.nonzero(np.isfinite(found.reshape(len(which), -1)))
        parts.append(np.stack([row + a, which.reshape(len(which), -1)[row, column]]))
    return np.concatenate(parts, 1)


def _cell_areas(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Return areas of cells, flat, with the middles between rows as bounds and the poles as the last ones; the unit does not matter."""

    def edges(c: np.ndarray) -> np.ndarray:
        if len(c) == 1:
            return np.array([c[0] - 0.5, c[0] + 0.5])
        middle = (c[1:] + c[:-1]) / 2
        return np.concatenate([[1.5 * c[0] - 0.5 * c[1]], middle, [1.5 * c[-1] - 0.5 * c[-2]]])

    bands = np.diff(np.sin(np.radians(np.clip(edges(latitude), -90.0, 90.0))))
    return np.outer(bands, np.diff(edges(longitude))).ravel()
