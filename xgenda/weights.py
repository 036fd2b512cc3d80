"""Weights of interpolation and regridding between grids of any kind, as `LinearMap`."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from scipy.spatial import cKDTree

from xgenda.curvilinear import AnyGrid, CurvilinearGrid, PointSet
from xgenda.errors import GridError
from xgenda.grids import EARTH_RADIUS, TOLERANCE, Grid
from xgenda.maps import LinearMap
from xgenda.maps import bilinear as rectilinear_bilinear
from xgenda.spherical import clip, normalised, polygon_areas, positions, tangents, unit_vectors, wrapped

#: Poleward of this latitude a cell is flattened by a gnomonic projection, elsewhere by taking latitude and longitude as plane.
POLAR = 80.0
NEIGHBOURS = 12  # quadrilaterals that are tried for a point, nearest first
SNAP = 1e-6  # of a cell: so close to a node, a point is the node
PAIRS_AT_ONCE = 200_000
SOURCES_AT_ONCE = 4096
POINTS_AT_ONCE = 20_000
FOOTPRINTS = ("disc", "gaussian")
CUT = 3.0  # standard deviations at which a Gaussian footprint ends
HALF = 0.5  # of a footprint must lie on the grid
SAMPLES = 64  # points that stand for a footprint near the edge of a grid
NEGLIGIBLE = 1e-13  # overlaps of less than this part of a cell are rounding


def interpolation(grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    """Build bilinear interpolation from the cell centres of a grid to points, or linear interpolation between points.

    Parameters
    ----------
    grid
        Source. Between the points of a `PointSet` interpolation is linear on its Delaunay triangles, see `PointSet.triangles`.
    latitude, longitude
        Points in degrees, shape (m,); longitudes in any convention. NaN is outside.

    Returns
    -------
    LinearMap
        Shape (m, grid.size). Rows of points outside are empty.
    numpy.ndarray
        Shape (m,), True where the point lies within the hull of the cell centres, never snapped to the edge. A rectilinear grid
        around the globe reaches over the poles: beyond its last row the value there is interpolated to that of the opposite meridian.
        A triangle between points with an edge longer than 5 median ones is a gap, and outside.

    Raises
    ------
    GridError
        For a curvilinear grid of one row, or points on one line.
    """
    latitude, longitude = np.asarray(latitude, dtype=float), np.asarray(longitude, dtype=float)
    if isinstance(grid, PointSet):
        return _in_triangles(grid, latitude, longitude)
    if isinstance(grid, CurvilinearGrid):
        return _in_quads(grid, latitude, longitude)
    return _over_the_poles(grid, latitude, longitude)


def _over_the_poles(grid: Grid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    """Interpolate on a rectilinear grid, mirrored at the poles where its rows end no further from them than they are apart."""
    ny, nx = grid.shape
    if not grid.periodic or nx % 2 or ny < 2:
        return rectilinear_bilinear(grid, latitude, longitude)
    step = np.diff(grid.latitude)
    south, north = int(-90.0 < grid.latitude[0] <= -90.0 + step[0]), int(90.0 > grid.latitude[-1] >= 90.0 - step[-1])
    beyond = (latitude > grid.latitude[-1]) & bool(north) | (latitude < grid.latitude[0]) & bool(south)
    if not (beyond & (np.abs(latitude) <= 90.0)).any():
        return rectilinear_bilinear(grid, latitude, longitude)
    rows = np.concatenate([[-180.0 - grid.latitude[0]] * south, grid.latitude, [180.0 - grid.latitude[-1]] * north])
    wider = Grid(rows, grid.longitude)
    points, inside = rectilinear_bilinear(wider, np.where(np.abs(latitude) <= 90.0, latitude, np.nan), longitude)
    source = np.arange(ny * nx).reshape(ny, nx)
    opposite = np.roll(source, nx // 2, axis=1)
    places = np.concatenate([*([opposite[:1]] * south), source, *([opposite[-1:]] * north)]).ravel()
    entries = points.matrix.tocoo()
    return LinearMap.from_entries(entries.row, places[entries.col], entries.data, (len(latitude), grid.size)), inside


def pole_means(grid: Grid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    """Build bilinear interpolation as ESMF does: beyond the last row of a globe, towards the mean of that row at the pole."""
    ny, nx = grid.shape
    points, inside = rectilinear_bilinear(grid, latitude, longitude)
    if not grid.periodic:
        return points, inside
    known = points.matrix.tocoo()
    rows, columns, weights = [known.row], [known.col], [known.data]
    for row, pole in ((0, -90.0), (ny - 1, 90.0)):
        cap = (
            ~inside & (np.abs(latitude) <= 90.0) & ((latitude - grid.latitude[row]) * np.sign(pole) > 0) & np.isfinite(longitude)
        )
        where = np.flatnonzero(cap)
        if not len(where):
            continue
        circle = Grid(grid.latitude[row : row + 1], grid.longitude)
        along, _ = rectilinear_bilinear(circle, np.full(len(where), grid.latitude[row]), longitude[where])
        part = (latitude[where] - grid.latitude[row]) / (pole - grid.latitude[row])
        entries = along.matrix.tocoo()
        rows += [where[entries.row], np.repeat(where, nx)]
        columns += [row * nx + entries.col, np.tile(row * nx + np.arange(nx), len(where))]
        weights += [entries.data * (1 - part)[entries.row], np.repeat(part / nx, nx)]
        inside = inside | cap
    shape = (len(latitude), grid.size)
    return LinearMap.from_entries(np.concatenate(rows), np.concatenate(columns), np.concatenate(weights), shape), inside


def _in_quads(grid: CurvilinearGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    if min(grid.shape) < 2:
        raise GridError(f"Bilinear interpolation needs at least 2 x 2 cells; the source is {grid.describe()}.")
    known = np.isfinite(latitude) & np.isfinite(longitude)
    at = np.flatnonzero(known)
    quads = grid.quads()
    nodes = grid.centres.reshape(-1, 3)
    middle = normalised(nodes[quads].sum(1))
    reach = np.linalg.norm(nodes[quads] - middle[:, None], axis=-1).max(1)
    points = unit_vectors(latitude[at], longitude[at])
    k = min(NEIGHBOURS, len(quads))
    distance, candidates = (a.reshape(len(at), k) for a in cKDTree(middle).query(points, k=k))
    found_quad = np.zeros(len(at), dtype=np.int64)
    found_u, found_v = np.zeros(len(at)), np.zeros(len(at))
    excess = np.full(len(at), np.inf)
    for c in range(k):
        todo = np.flatnonzero((excess > 0) & (distance[:, c] <= reach[candidates[:, c]] * (1 + 1e-6)))
        if not len(todo):
            continue
        quad = candidates[todo, c]
        u, v = _solve(_flattened(grid, quads[quad], latitude[at[todo]], longitude[at[todo]], points[todo]))
        out = np.maximum(np.maximum(-u, u - 1), np.maximum(-v, v - 1))
        out = np.where(out < SNAP, 0.0, out)
        better = out < excess[todo]
        chosen = todo[better]
        excess[chosen], found_quad[chosen], found_u[chosen], found_v[chosen] = out[better], quad[better], u[better], v[better]
    hit = excess <= TOLERANCE
    u, v = (np.clip(a, 0.0, 1.0) for a in (found_u, found_v))
    u, v = (np.where(a < SNAP, 0.0, np.where(a > 1 - SNAP, 1.0, a)) for a in (u, v))
    weights = np.stack([(1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v], -1) * hit[:, None]
    inside = np.zeros(len(latitude), dtype=bool)
    inside[at] = hit
    all_weights, all_indices = np.zeros((len(latitude), 4)), np.zeros((len(latitude), 4), dtype=np.int64)
    all_weights[at], all_indices[at] = weights, quads[found_quad]
    return LinearMap.from_rows(all_indices, all_weights, grid.size), inside


def _in_triangles(points: PointSet, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    """Interpolate on triangles: barycentric coordinates where the ray from the centre of the Earth crosses their plane."""
    nodes, triangles = unit_vectors(*points.points()), points.triangles
    corners = nodes[triangles]
    middle = normalised(corners.sum(1))
    reach = np.linalg.norm(corners - middle[:, None], axis=-1).max(1) * (1 + 1e-6)
    inward = np.linalg.inv(np.swapaxes(corners, 1, 2))  # from a position to multiples of the corners
    at = np.flatnonzero((np.abs(latitude) <= 90.0) & np.isfinite(longitude))
    wanted = unit_vectors(latitude[at], longitude[at])
    tree = cKDTree(middle)
    best, chosen, shares = np.full(len(at), -np.inf), np.zeros(len(at), dtype=np.int64), np.zeros((len(at), 3))

    def attempt(point: np.ndarray, triangle: np.ndarray) -> None:
        """Keep the better triangle of each point; in one call a point may come several times."""
        share = np.einsum("nij,nj->ni", inward[triangle], wanted[point])
        share /= share.sum(1, keepdims=True)
        least = share.min(1)
        order = np.argsort(least, kind="stable")  # of several, the best is written last
        point, triangle, share, least = point[order], triangle[order], share[order], least[order]
        better = least > best[point]
        best[point[better]], chosen[point[better]], shares[point[better]] = least[better], triangle[better], share[better]

    k = min(NEIGHBOURS, len(triangles))
    distance, candidates = (a.reshape(len(at), k) for a in tree.query(wanted, k=k))
    for c in range(k):
        todo = np.flatnonzero((best < 0) & (distance[:, c] <= reach[candidates[:, c]]))
        attempt(todo, candidates[todo, c])
    # a large triangle among small ones is not among the nearest centres
    lost = np.flatnonzero((best < 0) & (distance[:, -1] <= reach.max()))
    for first in range(0, len(lost), POINTS_AT_ONCE):
        some = lost[first : first + POINTS_AT_ONCE]
        pairs = cKDTree(wanted[some]).sparse_distance_matrix(tree, float(reach.max()), output_type="ndarray")
        pairs = pairs[pairs["v"] <= reach[pairs["j"]]]
        attempt(some[pairs["i"]], pairs["j"])
    hit = best >= -TOLERANCE
    shares = np.where(shares < SNAP, 0.0, shares)
    total = shares.sum(1, keepdims=True)
    inside = np.zeros(len(latitude), dtype=bool)
    inside[at] = hit
    weights, indices = np.zeros((len(latitude), 3)), np.zeros((len(latitude), 3), dtype=np.int64)
    weights[at], indices[at] = shares / np.where(total > 0, total, 1.0) * hit[:, None], triangles[chosen]
    return LinearMap.from_rows(indices, weights, points.size), inside


def _flattened(
    grid: CurvilinearGrid, quads: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Return the corners of quadrilaterals (n, 4) in a plane whose origin is the point of each, shape (n, 4, 2)."""
    phi, lam = (a[quads] for a in grid.points())
    flat = np.stack([wrapped(lam - longitude[:, None]), phi - latitude[:, None]], -1)
    polar = np.flatnonzero(np.abs(latitude) > POLAR)
    if len(polar):
        corners, p = grid.centres.reshape(-1, 3)[quads[polar]], points[polar]
        east, north = tangents(p)
        height = (corners * p[:, None]).sum(-1)
        flat[polar] = np.degrees(
            np.stack([(corners * east[:, None]).sum(-1), (corners * north[:, None]).sum(-1)], -1)
            / np.maximum(height, 1e-3)[..., None]
        )
    return flat


def _solve(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return u, v in [0, 1] where the bilinear map of the unit square to each quadrilateral (n, 4, 2) is the origin."""

    def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(x[:, 0] * y[:, 1] - x[:, 1] * y[:, 0])

    a, b, c = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]
    d = corners[:, 0] - corners[:, 1] + corners[:, 2] - corners[:, 3]
    # a + b u + c v + d u v = 0: the parts of a + c v across b + d v vanish
    square, linear, constant = cross(c, d), cross(a, d) + cross(c, b), cross(a, b)
    root = np.sqrt(np.maximum(linear**2 - 4 * square * constant, 0.0))
    q = -0.5 * (linear + np.where(linear >= 0, root, -root))
    best_u, best_v, least = np.full(len(a), np.inf), np.full(len(a), np.inf), np.full(len(a), np.inf)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for v in (constant / q, q / square):
            along = b + d * v[:, None]
            u = -((a + c * v[:, None]) * along).sum(-1) / (along * along).sum(-1)
            off = np.maximum(np.abs(u - 0.5), np.abs(v - 0.5))
            better = np.isfinite(off) & (off < least)
            best_u, best_v, least = (np.where(better, x, y) for x, y in ((u, best_u), (v, best_v), (off, least)))
    return best_u, best_v


def nearest(grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray, usable: np.ndarray | None = None) -> LinearMap:
    """Build the map to the nearest cell centre, by distance through the sphere.

    Parameters
    ----------
    grid
        Source.
    latitude, longitude
        Points in degrees, shape (m,).
    usable
        Source cells that may be taken, flat, bool; None takes all.
    """
    centres = unit_vectors(*grid.points())
    chosen = np.arange(grid.size) if usable is None else np.flatnonzero(usable)
    if not len(chosen):
        raise GridError("Every cell of the source is masked; there is no nearest one.")
    _, index = cKDTree(centres[chosen]).query(unit_vectors(latitude, longitude))
    return LinearMap.from_rows(chosen[index][:, None], np.ones((len(index), 1)), grid.size)


def footprint_means(
    grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray, radius: float, shape: str = "disc"
) -> tuple[LinearMap, np.ndarray]:
    """Build means over the cells around points, weighted by their areas.

    Parameters
    ----------
    grid
        Source, rectilinear or curvilinear.
    latitude, longitude
        Points in degrees, shape (m,). NaN is outside.
    radius
        In metres: of a disc, or the standard deviation of a Gaussian that is cut off at three of them; along great circles.
    shape
        'disc' or 'gaussian'.

    Returns
    -------
    LinearMap
        Shape (m, grid.size); rows add up to 1, or are empty where a point is outside. Where the footprint holds no cell centre the row is
        that of bilinear interpolation.
    numpy.ndarray
        Shape (m,), True where at least half of the footprint (half of its weight) lies in cells of the grid, or where `interpolation`
        says so.
    """
    if isinstance(grid, PointSet):
        raise GridError(f"A footprint needs cells with areas, and the source is {grid.describe()}.")
    latitude, longitude = np.asarray(latitude, dtype=float), np.asarray(longitude, dtype=float)
    angle = radius / EARTH_RADIUS
    reach = 2 * np.sin(min(angle * (CUT if shape == "gaussian" else 1.0), np.pi) / 2)
    at = np.flatnonzero((np.abs(latitude) <= 90.0) & np.isfinite(longitude))
    points, centres = unit_vectors(latitude[at], longitude[at]), unit_vectors(*grid.points())
    pairs = cKDTree(points).sparse_distance_matrix(cKDTree(centres), reach, output_type="ndarray")
    point, cell = pairs["i"], pairs["j"]
    weight = grid.areas().ravel()[cell]
    if shape == "gaussian":
        weight = weight * np.exp(-0.5 * (2 * np.arcsin(pairs["v"] / 2) / angle) ** 2)
    total = np.bincount(point, weight, len(at))
    means = LinearMap.from_entries(point, cell, weight / total[point], (len(at), grid.size))
    held = np.flatnonzero(total > 0)
    found, inside = interpolation(grid, latitude, longitude)
    inside[at[held]] = _share_on(grid, points[held], angle, reach, shape) >= HALF
    return found.replaced(at[held], means.select(held)).kept(inside), inside


def _share_on(grid: Grid | CurvilinearGrid, points: np.ndarray, angle: float, reach: float, shape: str) -> np.ndarray:
    """Return the part of the weight of footprints around points (m, 3) that lies in cells of a grid, from samples near its edge."""
    edge = np.ones(grid.shape, dtype=bool)
    edge[1:-1, slice(None) if grid.periodic else slice(1, -1)] = False
    centres = unit_vectors(*grid.points())
    radii = np.zeros(1)
    if isinstance(grid, CurvilinearGrid):
        radii = np.linalg.norm(grid.vertices - centres[:, None], axis=-1).max(1)
        widest = float(radii.max())
    else:
        rows, columns = grid.edges()
        widest = float(np.radians(np.hypot(np.diff(rows).max(), np.diff(columns).max())))
    share = np.ones(len(points))
    near = np.flatnonzero(np.isfinite(cKDTree(centres[edge.ravel()]).query(points, distance_upper_bound=reach + widest)[0]))
    # equal shares of the weight, on a spiral that turns by the golden angle (Vogel 1979, Math. Biosci. 44, 179-189)
    part = (np.arange(SAMPLES) + 0.5) / SAMPLES
    distance = angle * (np.sqrt(-2 * np.log1p(-part * -np.expm1(-0.5 * CUT**2))) if shape == "gaussian" else np.sqrt(part))
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(SAMPLES)
    east, north = tangents(points[near])
    aside = np.cos(turn)[:, None] * east[:, None] + np.sin(turn)[:, None] * north[:, None]
    sampled = np.cos(distance)[:, None] * points[near, None] + np.sin(distance)[:, None] * aside
    if isinstance(grid, CurvilinearGrid):
        apart, cell = cKDTree(centres).query(sampled)
        held = apart <= radii[cell]
    else:
        phi, lam = positions(sampled)
        held = (phi >= rows[0]) & (phi <= rows[-1]) & ((lam - columns[0]) % 360.0 <= columns[-1] - columns[0])
    share[near] = held.mean(1)
    return share


def conservative(source: AnyGrid, target: AnyGrid) -> tuple[LinearMap, np.ndarray, np.ndarray]:
    """Build first-order conservative regridding.

    Returns
    -------
    LinearMap
        Overlaps in steradians, shape (target.size, source.size).
    numpy.ndarray, numpy.ndarray
        Areas of the source and of the target cells in steradians. Between rectilinear grids cells end at parallels, elsewhere at great
        circles, as in ESMF; the areas are those of the same cells.
    """
    for name, grid in (("source", source), ("target", target)):
        if isinstance(grid, PointSet):
            raise GridError(
                f"Conservative regridding needs cells, and the {name} is {grid.describe()}; use 'bilinear' or 'nearest'."
            )
    assert not isinstance(source, PointSet)
    assert not isinstance(target, PointSet)
    if isinstance(source, Grid) and isinstance(target, Grid):
        return _by_axes(source, target)
    return _by_clipping(source.vertices, target.vertices)


def _by_axes(source: Grid, target: Grid) -> tuple[LinearMap, np.ndarray, np.ndarray]:
    (sy, sx), (ty, tx) = source.edges(), target.edges()
    rows = _overlaps(np.sin(np.radians(sy)), np.sin(np.radians(ty)))
    pieces = [_overlaps(np.radians(sx + turn), np.radians(tx)) for turn in (-720.0, -360.0, 0.0, 360.0, 720.0)]
    columns = pieces[0]
    for piece in pieces[1:]:
        columns = columns + piece
    overlap = scipy.sparse.kron(rows, columns, format="csr")
    areas = [np.outer(np.diff(np.sin(np.radians(y))), np.diff(np.radians(x))).ravel() for y, x in ((sy, sx), (ty, tx))]
    return LinearMap(scipy.sparse.csr_array(overlap)), areas[0], areas[1]


def _overlaps(source: np.ndarray, target: np.ndarray) -> scipy.sparse.csr_array:
    """Return the lengths that the intervals between ascending edges have in common, sparse, (targets, sources)."""
    edges = np.unique(np.concatenate([source, target]))
    middle, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    i, j = np.searchsorted(target, middle) - 1, np.searchsorted(source, middle) - 1
    both = (i >= 0) & (i < len(target) - 1) & (j >= 0) & (j < len(source) - 1) & (length > NEGLIGIBLE)
    return scipy.sparse.coo_array((length[both], (i[both], j[both])), shape=(len(target) - 1, len(source) - 1)).tocsr()


def _by_clipping(source: np.ndarray, target: np.ndarray) -> tuple[LinearMap, np.ndarray, np.ndarray]:
    clippers, owner = _convex(target)
    areas = polygon_areas(source), polygon_areas(target)
    s_centre, t_centre = normalised(source.sum(1)), normalised(clippers.sum(1))
    s_reach = np.linalg.norm(source - s_centre[:, None], axis=-1).max(1)
    t_reach = np.linalg.norm(clippers - t_centre[:, None], axis=-1).max(1)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    tree = cKDTree(t_centre)
    # sources in groups of like size, so that one large cell does not widen the search for all
    order = np.argsort(s_reach)
    widest = float(t_reach.max(initial=0.0))
    for start in range(0, len(order), SOURCES_AT_ONCE):
        group = order[start : start + SOURCES_AT_ONCE]
        near = tree.query_ball_point(s_centre[group], s_reach[group] + widest)
        subject = np.repeat(group, [len(n) for n in near])
        clipper = np.concatenate([np.asarray(n, dtype=np.int64) for n in near]) if len(subject) else np.zeros(0, dtype=np.int64)
        close = np.linalg.norm(s_centre[subject] - t_centre[clipper], axis=-1) <= s_reach[subject] + t_reach[clipper]
        subject, clipper = subject[close], clipper[close]
        for first in range(0, len(subject), PAIRS_AT_ONCE):
            s, t = subject[first : first + PAIRS_AT_ONCE], clipper[first : first + PAIRS_AT_ONCE]
            overlap = polygon_areas(clip(source[s], clippers[t]))
            real = overlap > NEGLIGIBLE * np.minimum(areas[0][s], areas[1][owner[t]])
            parts.append((owner[t[real]], s[real], overlap[real]))
    row, column, weight = (np.concatenate(p) for p in zip(*parts, strict=True)) if parts else (np.zeros(0, dtype=int),) * 3
    return LinearMap.from_entries(row, column, weight, (len(target), len(source))), areas[0], areas[1]


def _convex(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return convex polygons (n, 4, 3) and the cell that each belongs to: quadrilaterals with a reflex corner become two triangles."""
    before, after = np.roll(cells, 1, axis=1), np.roll(cells, -1, axis=1)
    turn = (cells * np.cross(cells - before, after - cells)).sum(-1)
    reflex = turn < -1e-9 * np.abs(turn).max(1, keepdims=True)
    bent = np.flatnonzero(reflex.any(1))
    if not len(bent):
        return cells, np.arange(len(cells))
    corner = reflex[bent].argmax(1)
    around = (corner[:, None] + np.arange(4)) % 4
    turned = cells[bent[:, None], around]  # starts at the reflex corner: the diagonal from there lies inside
    one, two = turned[:, [0, 1, 2, 2]], turned[:, [0, 2, 3, 3]]
    fine = np.delete(np.arange(len(cells)), bent)
    return np.concatenate([cells[fine], one, two]), np.concatenate([fine, bent, bent])
