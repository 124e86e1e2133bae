"use strict";
// Draws the charts (ECharts) and tables (Tabulator) of the report from the JSON in #data: what is in view first.
// Names of videos, classes and policies are other people's texts: they enter the page as text, or through `text()`.
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const text = (value) => echarts.format.encodeHTML(String(value));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const FONT = "Inter, system-ui, sans-serif";
  const ROWS_ON_PAPER = 40;
  let onPaper = false;
  const narrow = () => !onPaper && window.innerWidth < 640;
  const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}\u202f%`;
  const short = (value, most = 28) => (value.length > most ? `${value.slice(0, most - 1)}…` : value);
  // A name in a width, without its middle: names that begin alike often end differently.
  const within = (width) => (name) => {
    const most = Math.floor(width / 6.4); // characters, of 12 pixels
    return name.length > most ? `${name.slice(0, Math.ceil((most - 1) / 2))}…${name.slice(-Math.floor((most - 1) / 2))}` : name;
  };
  const number = (value) => {
    if (!Number.isFinite(value)) return "–";
    const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const unit = units.find(([size]) => Math.abs(value) >= size);
    return unit ? `${+(value / unit[0]).toPrecision(3)} ${unit[1]}` : `${+value.toPrecision(3)}`;
  };
  const SYMBOLS = { fixed: "circle", assigned: "diamond", calibrated: "pin", cascade: "rect", leap: "roundRect", random: "triangle", oracle: "emptyCircle" };
  const RUN_COLOURS = ["fixed", "assigned", "oracle", "calibrated", "cascade", "random", "cheap", "dear"];
  const CATEGORIES = ["fixed", "cascade", "oracle", "calibrated", "assigned", "random"];
  const categoryColours = (names) => names.map((_, i) => css(CATEGORIES[i % CATEGORIES.length]));
  const kindColour = (kind) => css(kind in SYMBOLS ? kind : "other");

  // Colours of points: from the cheapest to the costliest, by lightness too, so that no hue is needed to tell them.
  function pointColours(points) {
    const stops = [css("dear"), css("middle"), css("cheap")];
    return points.map((_, i) => {
      const at = points.length === 1 ? 0 : (2 * i) / (points.length - 1);
      const low = Math.min(1, Math.floor(at));
      return mixed(stops[low], stops[low + 1], at - low);
    });
  }
  function mixed(a, b, weight) {
    const [x, y] = [a, b].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    return `rgb(${x.map((value, i) => Math.round(value + weight * (y[i] - value))).join(",")})`;
  }

  const axis = (options) => ({
    nameTextStyle: { color: css("soft"), fontFamily: FONT, fontSize: 12 },
    axisLabel: { color: css("soft"), fontFamily: FONT, fontSize: 12, ...options.axisLabel },
    axisLine: { lineStyle: { color: css("line") } },
    axisTick: { lineStyle: { color: css("line") } },
    splitLine: { lineStyle: { color: css("line") } },
    ...Object.fromEntries(Object.entries(options).filter(([key]) => key !== "axisLabel")),
  });
  const base = (options) => ({
    animation: false,
    textStyle: { fontFamily: FONT, color: css("ink") },
    tooltip: {
      confine: true, backgroundColor: css("card"), borderColor: css("line"), textStyle: { color: css("ink"), fontFamily: FONT },
      ...options.tooltip,
    },
    legend: options.legend === undefined ? undefined : {
      textStyle: { color: css("soft"), fontFamily: FONT, fontSize: 12 }, itemWidth: 14, itemHeight: 10, top: 0, left: 0, type: onPaper ? "plain" : "scroll",
      pageIconColor: css("soft"), pageTextStyle: { color: css("soft") }, ...options.legend,
    },
    ...Object.fromEntries(Object.entries(options).filter(([key]) => key !== "tooltip" && key !== "legend")),
  });
  const tip = (title, rows) => `<div class="tip"><b>${text(title)}</b>${rows.map(([name, value]) => `<br>${text(name)}: ${text(value)}`).join("")}</div>`;

  // Whiskers: a line from `low` to `high` at x, with caps. Data: [x, low, high].
  const whiskers = (name, data, colour) => ({
    name, type: "custom", color: colour, silent: true, z: 1, data, encode: { x: 0, y: [1, 2] },
    renderItem(_, api) {
      const [x, low] = api.coord([api.value(0), api.value(1)]);
      const high = api.coord([api.value(0), api.value(2)])[1];
      const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: { stroke: colour, lineWidth: 1.2, opacity: 0.75 } });
      return { type: "group", children: [line(x, low, x, high), line(x - 4, low, x + 4, low), line(x - 4, high, x + 4, high)] };
    },
  });

  const CHARTS = { tradeoff, overview, mix, classmix, confusion, assigner, reliability, costs, stages, curve, calibration };

  const place = (row, x) => (x === "macs" ? row.macs_per_clip : row.clips_per_s ? 1000 / row.clips_per_s : null);
  const placed = (rows, x) => rows.filter((row) => place(row, x) !== null);
  const pareto = (rows, x) => {
    const known = rows.filter((row) => row.kind !== "oracle" && row.kind !== "random");
    return known
      .filter((row) => !known.some((other) => place(other, x) <= place(row, x) && other.top1 >= row.top1
        && (place(other, x) < place(row, x) || other.top1 > row.top1)))
      .sort((a, b) => place(a, x) - place(b, x));
  };
  // The best random mixtures of two fixed points: the upper hull of the points, from the cheapest to the most accurate one.
  function mixtures(rows, x) {
    const hull = [];
    const fixed = rows.filter((row) => row.kind === "fixed").map((row) => [place(row, x), 100 * row.top1]).sort(([a], [b]) => a - b);
    const isBelow = ([ax, ay], [bx, by], [cx, cy]) => (by - ay) * (cx - ax) <= (cy - ay) * (bx - ax);
    for (const at of fixed) {
      while (hull.length > 1 && isBelow(hull.at(-2), hull.at(-1), at)) hull.pop();
      hull.push(at);
    }
    return hull;
  }
  const mark = (row, x, colour) => ({
    value: [place(row, x), 100 * row.top1], row, symbol: SYMBOLS[row.kind] ?? "roundRect", symbolSize: row.reported ? 17 : 12,
    itemStyle: { color: colour, borderColor: css("card"), borderWidth: 1 },
  });
  const rounded = (value, span, way) => {
    const step = span > 30 ? 10 : span > 12 ? 5 : 1;
    return step * way(value / step);
  };
  const PLANE = { left: 46, right: 22, top: 56, bottom: 46 };
  const plane = (x) => ({
    grid: PLANE,
    xAxis: axis({ type: "value", scale: true, name: x === "macs" ? "multiply-adds per clip" : "milliseconds per clip", nameLocation: "middle", nameGap: 28, boundaryGap: ["6%", "6%"], min: ({ min, max }) => (min < 0.3 * max ? 0 : undefined), splitNumber: narrow() ? 3 : 5, axisLabel: { formatter: number, hideOverlap: true } }),
    yAxis: axis({ type: "value", scale: true, name: "top-1 %", nameLocation: "end", nameGap: 12, nameTextStyle: { color: css("soft"), align: "left", padding: [0, 0, 0, -34], fontSize: 12 }, splitNumber: 4, min: ({ min, max }) => Math.max(0, rounded(min - 0.1 * (max - min) - 0.5, max - min, Math.floor)), max: ({ min, max }) => Math.min(100, rounded(max + 0.1 * (max - min) + 0.5, max - min, Math.ceil)) }),
  });
  const policyTip = (item) => {
    if (!item.data?.row) return "";
    const row = item.data.row;
    const rows = [
      ["top-1", `${percent(row.top1)} (${(100 * row.top1_low).toFixed(1)} to ${(100 * row.top1_high).toFixed(1)})`],
      ["multiply-adds a clip", `${number(row.macs_per_clip)}, ${percent(row.macs_saved)} saved`],
    ];
    if (row.clips_per_s) rows.push(["measured", `${row.clips_per_s.toFixed(1)} clips/s, ${(1000 / row.clips_per_s).toFixed(2)} ms a clip`]);
    if (row.speedup) rows.push(["times as fast", `${row.speedup[0].toFixed(2)} (${row.speedup[1].toFixed(2)} to ${row.speedup[2].toFixed(2)})`]);
    rows.push(["mix", Object.entries(row.mix).map(([point, share]) => `${point}: ${percent(share, 0)}`).join(", ")]);
    return tip(item.data.run ? `${item.data.run}, ${row.name}` : row.name, rows);
  };

  function tradeoff(run, x) {
    const rows = placed(run.evaluation.policies, x);
    const kinds = [...new Set(rows.map((row) => row.kind))];
    const front = pareto(rows, x);
    return base({
      tooltip: { trigger: "item", formatter: policyTip },
      legend: { data: kinds },
      ...plane(x),
      series: [
        { type: "line", data: mixtures(rows, x), silent: true, symbol: "none", lineStyle: { color: kindColour("fixed"), width: 1, type: "dashed" }, z: 0 },
        { type: "line", data: front.map((row) => [place(row, x), 100 * row.top1]), silent: true, symbol: "none", lineStyle: { color: css("line"), width: 2 }, z: 0 },
        ...kinds.map((kind) => ({
          name: kind, type: "scatter", symbol: SYMBOLS[kind] ?? "roundRect", color: kindColour(kind), z: 3,
          data: rows.filter((row) => row.kind === kind).map((row) => mark(row, x, kindColour(kind))),
          label: { show: false, formatter: (item) => shortName(item.data.row), distance: NAME_DISTANCE, color: css("ink"), fontFamily: FONT, fontSize: 12, textBorderColor: css("card"), textBorderWidth: 3 },
        })),
        ...kinds.map((kind) => whiskers(kind, rows.filter((row) => row.kind === kind).map((row) => [place(row, x), 100 * row.top1_low, 100 * row.top1_high]), kindColour(kind))),
      ],
    });
  }

  // The name of a policy stands beside its mark, where it covers no mark and no other name and no other mark is nearer. Or
  // else it is left out: the table has it, too. Pixels are known only once the chart is drawn.
  const NAME_DISTANCE = 6, GAP = 3;
  const shortName = (row) => short(row.name, 24);
  function placeNames(chart) {
    const series = chart.getOption().series;
    const marks = series.flatMap((each, at) => (each.type !== "scatter" ? [] : each.data.map((item, i) => ({ at, i, row: item.row, half: item.symbolSize / 2, pixel: chart.convertToPixel({ seriesIndex: at }, item.value) }))));
    const box = ([x, y], width, height) => ({ x, y, across: width / 2 + GAP, up: height / 2 + GAP }); // its middle
    const taken = marks.map(({ pixel, half }) => box(pixel, half, half));
    const covers = (a, b) => Math.abs(a.x - b.x) < a.across + b.across && Math.abs(a.y - b.y) < a.up + b.up;
    const far = (a, [x, y]) => Math.hypot(Math.max(0, Math.abs(a.x - x) - a.across), Math.max(0, Math.abs(a.y - y) - a.up));
    const fits = (a, own) => a.x - a.across > 0 && a.x + a.across < chart.getWidth() && a.y - a.up > PLANE.top && a.y + a.up < chart.getHeight() - PLANE.bottom && !taken.some((other) => covers(a, other))
      && marks.every((other) => far(a, own) <= far(a, other.pixel) + GAP);
    const labels = series.map((each) => each.type === "scatter" && each.data.map(() => ({ show: false })));
    for (const { at, i, row, half, pixel } of marks) {
      const { width, height } = echarts.format.getTextRect(shortName(row), `12px ${FONT}`);
      const beside = [0, -1, 1].flatMap((lines) => ["right", "left"].map((side) => {
        const away = (half + NAME_DISTANCE + width / 2) * (side === "right" ? 1 : -1);
        return { label: { show: true, position: side, offset: [0, lines * height] }, box: box([pixel[0] + away, pixel[1] + lines * height], width, height) };
      }));
      const above = ["top", "bottom"].map((side) => {
        const away = (half + NAME_DISTANCE + height / 2) * (side === "bottom" ? 1 : -1);
        return { label: { show: true, position: side }, box: box([pixel[0], pixel[1] + away], width, height) };
      });
      const found = [...beside, ...above].find((place) => fits(place.box, pixel));
      if (!found) continue;
      taken.push(found.box);
      labels[at][i] = found.label;
    }
    chart.setOption({ series: series.map((each, at) => (labels[at] ? { data: each.data.map((item, i) => ({ ...item, label: labels[at][i] })) } : {})) });
  }

  function overview(_, x) {
    const runs = DATA.runs.filter((run) => run.evaluation);
    const colours = DATA.runs.map((_, i) => css(RUN_COLOURS[i]));
    return base({
      tooltip: { trigger: "item", formatter: policyTip },
      legend: { data: runs.map((run) => run.name), formatter: (name) => short(name, 24) },
      ...plane(x),
      series: runs.flatMap((run) => {
        const colour = colours[DATA.runs.indexOf(run)];
        const rows = placed(run.evaluation.policies, x);
        return [
          { name: run.name, type: "line", silent: true, symbol: "none", color: colour, lineStyle: { color: colour, width: 2, opacity: 0.6 }, data: pareto(rows, x).map((row) => [place(row, x), 100 * row.top1]) },
          { ...whiskers(run.name, rows.map((row) => [place(row, x), 100 * row.top1_low, 100 * row.top1_high]), colour) },
          { name: run.name, type: "scatter", color: colour, z: 3, data: rows.map((row) => ({ ...mark(row, x, colour), run: run.name })) },
        ];
      }),
    });
  }

  const stacked = (names, colours, rows, values, unit) => names.map((name, i) => ({
    name, type: "bar", stack: "all", barMaxWidth: 26, color: colours[i], emphasis: { disabled: true },
    itemStyle: { borderColor: css("card"), borderWidth: 1 }, data: rows.map((row) => values(row, name)), tooltip: { valueFormatter: unit },
  }));

  function mix(run) {
    const names = run.points.map((point) => point.point);
    const row = run.evaluation.policies.find((policy) => policy.name === run.evaluation.reported);
    const series = stacked(names, pointColours(names), [row], (policy, name) => 100 * policy.mix[name], (value) => `${value.toFixed(1)} %`);
    for (const one of series) {
      one.barMaxWidth = 46;
      one.label = { show: true, fontFamily: FONT, color: css("card"), fontWeight: 600, formatter: (item) => (item.value >= 7 ? `${item.value.toFixed(0)} %` : "") };
    }
    return base({
      tooltip: { trigger: "axis", axisPointer: { type: "none" } }, legend: { data: names, formatter: (name) => `point ${name}` },
      grid: { left: narrow() ? 8 : 170, right: 20, top: 40, bottom: 30 },
      xAxis: axis({ type: "value", max: 100, axisLabel: { formatter: "{value} %" } }),
      yAxis: axis({ type: "category", data: ["all clips"], axisTick: { show: false }, axisLabel: { show: !narrow() } }), series,
    });
  }

  function classmix(run, _, element) {
    const names = run.points.map((point) => point.point);
    const rows = rowsOf(run.evaluation.classes).sort((a, b) => a.macs_per_clip - b.macs_per_clip);
    const shown = onPaper ? ROWS_ON_PAPER : 18;
    element.style.height = `${Math.min(rows.length, shown) * 24 + 60}px`;
    const zoom = rows.length > shown
      ? [{ type: "slider", show: !onPaper, yAxisIndex: 0, right: 4, width: 14, startValue: rows.length - shown, endValue: rows.length - 1, showDetail: false, brushSelect: false, borderColor: css("line"), fillerColor: css("line"), handleSize: 0 }, { type: "inside", yAxisIndex: 0, zoomOnMouseWheel: false, moveOnMouseWheel: true, startValue: rows.length - shown, endValue: rows.length - 1 }]
      : [];
    return base({
      tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (items) => tip(rows[items[0].dataIndex].class, [...items.map((item) => [`point ${item.seriesName}`, `${item.value.toFixed(0)} %`]), ["multiply-adds a clip", number(rows[items[0].dataIndex].macs_per_clip)], ["videos", rows[items[0].dataIndex].videos]]) },
      grid: { left: narrow() ? 110 : 170, right: zoom.length && !onPaper ? 34 : 20, top: 6, bottom: 30 },
      dataZoom: zoom,
      xAxis: axis({ type: "value", max: 100, axisLabel: { formatter: "{value} %" } }),
      yAxis: axis({ type: "category", data: rows.map((row) => row.class), axisTick: { show: false }, axisLabel: { formatter: within(narrow() ? 96 : 152), interval: 0 } }),
      series: stacked(names, pointColours(names), rows, (row, name) => 100 * (row[`at ${name}`] ?? 0)),
    });
  }

  const matrix = (columns, rows, cells, most, formatter, tooltip, names) => base({
    tooltip: { formatter: tooltip },
    grid: { left: names.left, right: 14, top: 10, bottom: names.bottom },
    xAxis: axis({ type: "category", data: columns, name: names.x, nameLocation: "middle", nameGap: names.bottom - 22, splitLine: { show: false }, axisLabel: { interval: 0, rotate: names.rotate, formatter: within(names.width) } }),
    yAxis: axis({ type: "category", data: rows, inverse: true, name: names.y, splitLine: { show: false }, axisLabel: { interval: 0, formatter: within(names.left - 12) } }),
    visualMap: { show: false, min: 0, max: most, dimension: 2, inRange: { color: [css("card"), css("middle")] } },
    series: [{ type: "heatmap", data: cells.map((value) => ({ value, label: { color: value[2] > 0.55 * most ? css("card") : css("ink") } })), label: { show: true, fontSize: 11, fontFamily: FONT, formatter }, itemStyle: { borderColor: css("line"), borderWidth: 0.5 }, emphasis: { disabled: true } }],
  });

  function confusion(run, _, element) {
    const found = run.evaluation.confusion;
    if (!found.cells) return pairs(found.pairs, element);
    const side = narrow() ? 90 : 160;
    element.style.height = `${found.classes.length * (narrow() ? 20 : 28) + side + 20}px`;
    return matrix(found.classes, found.classes, found.cells, 1, (item) => (item.value[2] >= 0.005 && !narrow() ? (100 * item.value[2]).toFixed(0) : ""),
      (item) => tip(`${found.classes[item.value[1]]} → ${found.classes[item.value[0]]}`, [["videos", item.value[3]], ["of the class", percent(item.value[2])]]),
      { left: side, bottom: side, rotate: 90, width: side - 26, x: "", y: "" });
  }
  function pairs(rows, element) {
    const shown = [...rows].reverse();
    element.style.height = `${shown.length * 24 + 50}px`;
    const names = shown.map((row) => `${row.truth} → ${row.prediction || "no answer"}`);
    const half = within(narrow() ? 56 : 148);
    const pair = (row) => `${half(row.truth)} → ${half(row.prediction || "no answer")}`;
    return base({
      tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (items) => tip(names[items[0].dataIndex], [["videos", items[0].value], ["of the class", percent(shown[items[0].dataIndex].fraction)]]) },
      grid: { left: narrow() ? 140 : 330, right: 30, top: 6, bottom: 28 },
      xAxis: axis({ type: "value", minInterval: 1 }),
      yAxis: axis({ type: "category", data: names, axisTick: { show: false }, axisLabel: { formatter: (_, i) => pair(shown[i]), interval: 0 } }),
      series: [{ type: "bar", color: css("assigned"), barMaxWidth: 14, data: shown.map((row) => row.videos) }],
    });
  }

  function assigner(run) {
    const found = run.evaluation.assigner;
    const most = Math.max(...found.cells.map((cell) => cell[2]), 1);
    return matrix(found.columns.map((point) => `got ${point}`), found.rows.map((row) => (row === "none right" ? row : `needs ${row}`)), found.cells, most, (item) => String(item.value[2]),
      (item) => tip(`cheapest right: ${found.rows[item.value[1]]}, got ${found.columns[item.value[0]]}`, [["clips", item.value[2]]]),
      { left: 108, bottom: 30, rotate: 0, width: 90, x: "", y: "" });
  }

  function reliability(run) {
    const lines = run.evaluation.assigner.reliability;
    const colours = pointColours(run.points.map((point) => point.point));
    const colour = (line) => colours[run.points.findIndex((point) => point.point === line.point)];
    return base({
      tooltip: { trigger: "item", formatter: (item) => (item.data.bin ? tip(`point ${item.seriesName}`, [["said", percent(item.data.bin.p)], ["observed", `${percent(item.data.bin.observed)} (${(100 * item.data.bin.low).toFixed(0)} to ${(100 * item.data.bin.high).toFixed(0)})`], ["clips", item.data.bin.clips]]) : "") },
      legend: { data: lines.map((line) => line.point), formatter: (name) => `point ${name} suffices` },
      grid: { left: 46, right: 20, top: 40, bottom: 44 },
      xAxis: axis({ type: "value", min: 0, max: 100, name: "said %", nameLocation: "middle", nameGap: 26 }),
      yAxis: axis({ type: "value", min: 0, max: 100, name: "observed %", nameLocation: "middle", nameGap: 32 }),
      series: [
        { type: "line", data: [[0, 0], [100, 100]], symbol: "none", silent: true, lineStyle: { color: css("soft"), type: "dashed", width: 1 } },
        ...lines.map((line) => ({ name: line.point, type: "line", color: colour(line), symbolSize: 8, symbol: "circle", data: line.bins.map((bin) => ({ value: [100 * bin.p, 100 * bin.observed], bin })) })),
        ...lines.map((line) => whiskers(line.point, line.bins.map((bin) => [100 * bin.p, 100 * bin.low, 100 * bin.high]), colour(line))),
      ],
    });
  }

  function costs(run) {
    const parts = Object.keys(run.points[0].parts);
    const rows = [...run.points].reverse();
    const palette = categoryColours(parts);
    return base({
      tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, valueFormatter: number },
      legend: { data: parts.map((part) => part.replaceAll("_", " ")) },
      grid: { left: 74, right: 24, top: 44, bottom: 30 },
      xAxis: axis({ type: "value", splitNumber: narrow() ? 3 : 5, axisLabel: { formatter: number } }),
      yAxis: axis({ type: "category", data: rows.map((row) => row.point), axisTick: { show: false } }),
      series: stacked(parts, palette, rows, (row, part) => row.parts[part], number).map((one) => ({ ...one, name: one.name.replaceAll("_", " ") })),
    });
  }

  function stages(run, _, element) {
    const rows = run.evaluation.policies.filter((row) => row.stages_s).reverse();
    const names = [...new Set(rows.flatMap((row) => Object.keys(row.stages_s)))];
    element.style.height = `${Math.max(200, rows.length * 34 + 80)}px`;
    return base({
      tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, valueFormatter: (value) => `${value.toFixed(2)} ms` },
      legend: { data: names },
      grid: { left: narrow() ? 96 : 150, right: 24, top: 44, bottom: 34 },
      xAxis: axis({ type: "value", axisLabel: { formatter: "{value} ms", hideOverlap: true } }),
      yAxis: axis({ type: "category", data: rows.map((row) => row.name), axisTick: { show: false }, axisLabel: { formatter: within(narrow() ? 86 : 138), interval: 0 } }),
      series: stacked(names, categoryColours(names), rows, (row, name) => 1000 * (row.stages_s[name] ?? 0)),
    });
  }

  function curve(run, kind) {
    const { points, lines, epochs } = run.curves;
    const colours = pointColours(points);
    const factor = kind === "top1" ? 100 : 1;
    const line = (source, type) => points.map((point, i) => [lines[`${source} ${kind}/${point}`], point, colours[i]]).filter(([data]) => data?.length)
      .map(([data, name, colour]) => ({ name, type: "line", color: colour, showSymbol: source === "val", symbolSize: 5, lineStyle: { type, width: source === "val" ? 2.2 : 1.2, opacity: source === "val" ? 1 : 0.75 }, data: data.map(([x, y]) => [x, factor * y]) }));
    return base({
      tooltip: { trigger: "axis", valueFormatter: (value) => (Number.isFinite(value) ? value.toFixed(kind === "top1" ? 1 : 3) : "–") },
      legend: { data: points, formatter: (name) => `point ${name}` },
      grid: { left: 44, right: 20, top: 40, bottom: 42 },
      xAxis: axis({ type: "value", name: "epoch", nameLocation: "middle", nameGap: 26, max: epochs || undefined }),
      yAxis: axis({ type: "value", scale: kind !== "top1" }),
      series: [...line("train", "dashed"), ...line("val", "solid")],
    });
  }

  function calibration(run) {
    const { curve: rows, eps, max_cost, chosen } = run.calibration;
    const bound = max_cost != null ? { xAxis: 100 * max_cost, name: "promised cost" } : eps === undefined ? undefined : { yAxis: 100 * eps, name: "tolerated loss" };
    const groups = [["valid", rows.filter((row) => row.valid), css("oracle"), "circle"], ["not valid", rows.filter((row) => !row.valid), css("random"), "emptyCircle"]];
    return base({
      tooltip: { trigger: "item", formatter: (item) => (item.data?.row ? tip(item.data.row.policy, [["cost", percent(item.data.row.cost)], ["loss", percent(item.data.row.loss)], ["at most", item.data.row.loss_upper == null ? "–" : percent(item.data.row.loss_upper)]]) : "") },
      legend: { data: groups.map(([name]) => name) },
      grid: { left: 50, right: 24, top: 56, bottom: 46 },
      xAxis: axis({ type: "value", scale: true, name: "cost, % of the costliest point", nameLocation: "middle", nameGap: 28 }),
      yAxis: axis({ type: "value", name: "loss, points", nameTextStyle: { color: css("soft"), align: "left", padding: [0, 0, 0, -36] } }),
      series: [
        whiskers("bound", rows.filter((row) => row.loss_upper != null).map((row) => [100 * row.cost, 100 * row.loss, 100 * row.loss_upper]), css("soft")),
        ...groups.map(([name, group, colour, symbol]) => ({
          name, type: "scatter", color: colour, symbol, symbolSize: 9, data: group.map((row) => ({ value: [100 * row.cost, 100 * row.loss], row, symbolSize: row.policy === chosen ? 18 : 9, label: { show: row.policy === chosen, formatter: () => `chosen: ${row.policy}`, position: row.cost > 0.7 ? "left" : "right", color: css("ink"), textBorderColor: css("card"), textBorderWidth: 3 } })),
          markLine: !bound || name !== "valid" ? undefined : { silent: true, symbol: "none", data: [bound], lineStyle: { color: css("bad") }, label: { formatter: "{b}", position: "insideStartTop", color: css("bad"), textBorderColor: css("card"), textBorderWidth: 3 } },
        })),
      ],
    });
  }

  // Tables.
  function rowsOf({ rows, columns }) {
    const lists = Object.entries(columns);
    return Array.from({ length: rows }, (_, i) => {
      const row = {};
      for (const [name, column] of lists) row[name] = column.values ? column.values[i] : column.texts[column.codes[i]];
      return row;
    });
  }
  const verdict = (cell) => {
    const right = cell.getValue();
    const element = document.createElement("span");
    element.className = right ? "yes" : "no";
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", right ? "right" : "wrong");
    element.textContent = right ? "✓" : "✗";
    return element;
  };
  const numeric = (title, field, show, more = {}) => ({ title, field, sorter: "number", hozAlign: "right", headerHozAlign: "right", formatter: (cell) => show(cell.getValue()), ...more });
  const plainText = (title, field, more = {}) => ({ title, field, formatter: "plaintext", ...more });
  const signed = (value) => (value === null ? "–" : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(100 * value).toFixed(1)}`);

  const COLUMNS = {
    clips: (run, rows) => [
      plainText("video", "video", { widthGrow: 3, minWidth: 170 }),
      ...(rows.some((row) => row.clip > 0) ? [numeric("clip", "clip", String, { minWidth: 64 })] : []),
      plainText("class", "truth", { widthGrow: 2, minWidth: 150 }),
      plainText("answer", "prediction", { widthGrow: 2, minWidth: 150 }),
      { title: "right", field: "right", formatter: verdict, hozAlign: "center", minWidth: 72, sorter: "number" },
      plainText("point", "point", { minWidth: 76 }),
      numeric("MACs", "macs", number, { minWidth: 96 }),
      ...run.points.map(({ point }) => ({ title: `at ${point}`, field: `right at ${point}`, formatter: verdict, hozAlign: "center", minWidth: 72, sorter: "number" })),
    ],
    classes: (run) => {
      const names = run.points.map(({ point }) => point);
      const colours = pointColours(names);
      return [
        plainText("class", "class", { widthGrow: 2, minWidth: 170 }),
        numeric("videos", "videos", String, { minWidth: 84 }),
        numeric("costliest %", "top1_costliest", (value) => (100 * value).toFixed(1), { minWidth: 110 }),
        numeric("routed %", "top1", (value) => (100 * value).toFixed(1), { minWidth: 100 }),
        numeric("change", "change", signed, { minWidth: 92 }),
        numeric("MACs", "macs_per_clip", number, { minWidth: 92 }),
        { title: "mix, costliest first", field: `at ${names[0]}`, minWidth: 150, widthGrow: 1, sorter: "number", formatter: (cell) => mixBar(cell.getRow().getData(), names, colours) },
        plainText("taken for", "taken_for", { widthGrow: 2, minWidth: 150 }),
      ];
    },
  };
  function mixBar(row, names, colours) {
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", names.map((name) => `${name}: ${percent(row[`at ${name}`] ?? 0, 0)}`).join(", "));
    names.forEach((name, i) => {
      const part = document.createElement("i");
      part.style.cssText = `flex: ${row[`at ${name}`] ?? 0}; background: ${colours[i]}`;
      bar.append(part);
    });
    return bar;
  }

  function drawTable(element) {
    const kind = element.dataset.table;
    const run = DATA.runs[element.dataset.run];
    const rows = rowsOf(run.evaluation[kind]);
    for (const row of rows) row.searched = `${row.video ?? ""}\n${row.truth ?? row.class}`.toLowerCase();
    const form = document.querySelector(`form[data-controls="${kind}"][data-run="${element.dataset.run}"]`);
    const output = form.querySelector("output");
    element.setAttribute("aria-label", kind === "clips" ? "Clips" : "Classes");
    const table = new Tabulator(element, {
      data: rows, columns: COLUMNS[kind](run, rows), nestedFieldSeparator: false, layout: "fitColumns", height: rows.length > 12 ? "480px" : undefined,
      placeholder: "Nothing matches.", headerSortElement: "<span aria-hidden='true'>↕</span>", columnDefaults: { headerTooltip: false },
    });
    element.table = table;
    const count = (shown) => { output.textContent = shown === rows.length ? `${rows.length.toLocaleString("en")} rows` : `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`; };
    table.on("dataFiltered", (_, shown) => count(shown.length));
    count(rows.length);
    const filter = () => {
      const { text: words, point, right } = Object.fromEntries(new FormData(form));
      const wanted = words.toLowerCase().trim();
      table.setFilter((row) => row.searched.includes(wanted) && (!point || row.point === point) && (!right || String(row.right) === right));
    };
    let waiting;
    form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.elements.save.addEventListener("click", () => table.download("csv", `${run.name}-${kind}.csv`));
    // Sorting from the keyboard. What scrolls can have the focus, so it takes the role of the rows' group.
    table.on("tableBuilt", () => {
      element.querySelector(".tabulator-tableholder").setAttribute("role", "rowgroup");
      element.querySelector(".tabulator-table").setAttribute("role", "presentation");
      for (const head of element.querySelectorAll(".tabulator-col.tabulator-sortable")) {
        head.tabIndex = 0;
        head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); head.click(); } });
      }
    });
  }

  // Drawing: a chart when it comes near the window, anew when the colours change.
  const drawn = new Map();
  function drawChart(element) {
    drawn.get(element)?.dispose();
    const { chart: kind, run, x } = element.dataset;
    const option = CHARTS[kind](DATA.runs[run], x, element);
    const chart = echarts.init(element, null, { renderer: "svg" });
    chart.setOption(option);
    if (kind === "tradeoff") placeNames(chart);
    drawn.set(element, chart);
  }
  function draw(element) {
    if (element.dataset.drawn) return;
    element.dataset.drawn = "yes";
    if (element.dataset.table) drawTable(element);
    else drawChart(element);
  }
  const parts = [...document.querySelectorAll("[data-chart], [data-table]")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
    }
  }, { rootMargin: "300px" });
  // What is in the window is drawn before the page has loaded: a browser without a head takes its picture then.
  const near = (element) => !element.closest("[hidden]") && element.getBoundingClientRect().top < window.innerHeight + 300;
  parts.filter(near).forEach(draw);
  parts.forEach((element) => watcher.observe(element));
  // The others follow while the browser is idle, so that a picture of the whole page has them.
  const whenIdle = window.requestIdleCallback ?? ((work) => setTimeout(work, 50)); // Safari has none
  function drawOthers() {
    const next = parts.find((element) => !element.dataset.drawn && !element.closest("[hidden]"));
    if (!next) return;
    draw(next);
    whenIdle(drawOthers);
  }
  const redraw = () => [...drawn.keys()].forEach((element) => { if (element.offsetParent) drawChart(element); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let settled, width = window.innerWidth;
  window.addEventListener("resize", () => {
    clearTimeout(settled);
    settled = setTimeout(() => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); } }, 150);
  });
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      document.querySelectorAll("[data-show]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      document.querySelectorAll(".run").forEach((run) => { run.hidden = run.id !== `run-${button.dataset.show}`; });
      redraw();
      whenIdle(drawOthers);
    });
  }

  // Printing. The window's width, colours and scroll position are not those of the paper, so each chart and table gets a
  // sheet beside it: a drawing of a fixed size, which the style sheet scales to its column, or a plain table.
  const WIDE = 760, HALF = 400;
  const root = document.documentElement;
  const paperNote = (words) => Object.assign(document.createElement("p"), { className: "note", textContent: `${words} The page on a screen has all of them.` });
  function chartSheet(element) {
    const { chart: kind, run, x } = element.dataset;
    const sized = { style: { height: element.classList.contains("flat") ? 130 : element.classList.contains("low") ? 300 : 380 } };
    const option = CHARTS[kind](DATA.runs[run], x, sized);
    const chart = echarts.init(null, null, { renderer: "svg", ssr: true, width: element.closest(".grid") ? HALF : WIDE, height: parseInt(sized.style.height, 10) });
    chart.setOption(option);
    if (kind === "tradeoff") placeNames(chart);
    const sheet = document.createElement("div");
    sheet.setAttribute("role", "img");
    sheet.setAttribute("aria-label", element.getAttribute("aria-label"));
    sheet.innerHTML = chart.renderToSVGString(); // ECharts escapes the names in it
    chart.dispose();
    const classes = DATA.runs[run]?.evaluation?.classes.rows;
    if (kind === "classmix" && classes > ROWS_ON_PAPER) sheet.append(paperNote(`The ${ROWS_ON_PAPER} costliest of ${classes} classes.`));
    return sheet;
  }
  function tableSheet(element) {
    const run = DATA.runs[element.dataset.run];
    const rows = element.table?.initialized ? element.table.getData("active") : rowsOf(run.evaluation[element.dataset.table]);
    const columns = COLUMNS[element.dataset.table](run, rows);
    const sheet = document.createElement("div");
    const table = sheet.appendChild(document.createElement("table"));
    table.className = "plain";
    const kind = ({ formatter }) => (formatter === "plaintext" ? "text" : "");
    const head = table.createTHead().insertRow();
    for (const column of columns) head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: column.title, className: kind(column) }));
    const body = table.createTBody();
    for (const row of rows.slice(0, ROWS_ON_PAPER)) {
      const line = body.insertRow();
      for (const column of columns) {
        const cell = Object.assign(line.insertCell(), { className: kind(column) });
        const value = row[column.field];
        cell.append(typeof column.formatter === "function" ? column.formatter({ getValue: () => value, getRow: () => ({ getData: () => row }) }) : value ?? "");
      }
    }
    if (rows.length > ROWS_ON_PAPER) sheet.append(paperNote(`The first ${ROWS_ON_PAPER} of ${rows.length.toLocaleString("en")} rows.`));
    if (!rows.length) sheet.append(Object.assign(document.createElement("p"), { className: "note", textContent: "Nothing matches." }));
    return sheet;
  }
  function toPaper() {
    if ("paper" in root.dataset) return;
    root.dataset.paper = ""; // first, since it sets the colours
    onPaper = true;
    for (const element of parts.filter((part) => !part.closest("[hidden]"))) {
      const sheet = element.dataset.chart ? chartSheet(element) : tableSheet(element);
      sheet.classList.add("sheet");
      element.after(sheet);
    }
    onPaper = false;
  }
  const print = window.matchMedia("print");
  function fromPaper() {
    if (print.matches) return; // its change event follows
    document.querySelectorAll(".sheet").forEach((sheet) => sheet.remove());
    delete root.dataset.paper;
  }
  window.addEventListener("beforeprint", toPaper);
  window.addEventListener("afterprint", fromPaper);
  print.addEventListener("change", () => (print.matches ? toPaper() : fromPaper()));
  if (print.matches) toPaper();

  document.querySelectorAll("[data-colour]").forEach((card) => card.style.setProperty("--run", `var(--${RUN_COLOURS[card.dataset.colour]})`));
  document.documentElement.dataset.ready = "yes";
  whenIdle(drawOthers);
})();
