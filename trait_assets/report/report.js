/* Draws the report's charts with plotly.js and moves its slider. Data comes from the JSON in #data.
   Texts of models are only ever set as text. */
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  // plotly reads a few tags in its labels
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const signed = (value, digits = 1) =>
    value === null || value === undefined ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const range = (low, high, show) => (low === null || high === null ? "" : ` [${show(low)}, ${show(high)}]`);
  const faint = (colour, share) => {
    const n = parseInt(colour.slice(1), 16);
    return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${share})`;
  };
  let printing = false;

  const theme = () =>
    Object.fromEntries(
      ["ink", "muted", "surface", "line", "grid", "pos", "neg", "ctl", "prompt"].map((name) => [name, css(`--${name}`)]),
    );
  const sequential = () => [0, 1, 2, 3, 4].map((i) => [i / 4, css(`--heat-${i}`)]);
  const diverging = (t) => [[0, t.neg], [0.5, css("--heat-0")], [1, t.pos]];

  const axis = (t, more = {}) => ({
    gridcolor: t.grid, linecolor: t.line, zerolinecolor: t.line, tickcolor: t.line, ticks: "outside", ticklen: 3,
    automargin: true, fixedrange: true, ...more, title: { standoff: 6, font: { size: printing ? 9 : 11.5, color: t.muted }, ...(more.title || {}) },
  });
  const layout = (t, more = {}) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: printing ? 9 : 11.5, color: t.ink },
    margin: { l: 44, r: 12, t: 10, b: 36 }, showlegend: false, dragmode: false, hovermode: "closest",
    hoverlabel: { bgcolor: t.surface, bordercolor: t.line, font: { color: t.ink } },
    ...more,
  });
  const show = (element, traces, made) => {
    // on paper a figure is half a page wide, whatever the window was
    const size = printing ? { width: 335, height: element.matches(".tall") && element.clientHeight > 230 ? 260 : 200, autosize: false } : { autosize: true };
    return Plotly.react(element, traces, { ...made, ...size }, { displayModeBar: false, responsive: true, doubleClick: false });
  };

  // on a phone and on paper titles and tick labels need shorter words and larger steps
  const phone = window.matchMedia("(max-width: 480px)");
  const narrow = () => phone.matches || printing;

  const charts = {
    heat(element, trait) {
      const { heat } = trait, t = theme();
      const site = heat.sites[Number(element.dataset.site || 0)];
      const metric = element.dataset.metric || Object.keys(heat.metrics)[0];
      const z = site.metrics[metric] || site.methods.map(() => site.layers.map(() => null));
      const known = z.flat().filter((value) => value !== null);
      const share = metric !== "effect_size_d";
      const top = share ? 1 : Math.max(...known, 1);
      const shapes = [];
      if (site.best) {
        const x = site.layers.indexOf(site.best.layer), y = site.methods.indexOf(site.best.method);
        shapes.push({ type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: t.pos, width: 2.5 } });
      }
      const traces = [{
        type: "heatmap", x: site.layers.map(String), y: site.methods, z, zmin: share ? 0.5 : 0, zmax: top,
        colorscale: sequential(), xgap: 1, ygap: 2, hoverongaps: false,
        colorbar: { thickness: 9, outlinewidth: 0, len: 1, tickfont: { size: 10 }, tickformat: share ? ".0%" : ".1f" },
        hovertemplate: `%{y}, layer %{x}<br>${plain(heat.metrics[metric])} %{z:.3f}<extra></extra>`,
      }];
      if (metric.endsWith("auc")) traces[0].colorbar.tickformat = ".2f";
      show(element, traces, layout(t, {
        shapes, xaxis: axis(t, { type: "category", title: { text: "layer" }, showgrid: false, nticks: narrow() ? 10 : 16, tickangle: 0 }),
        yaxis: axis(t, { type: "category", autorange: "reversed", showgrid: false, ticks: "" }),
      }));
      if (!element.dataset.listens) {
        element.dataset.listens = "1";
        element.on("plotly_click", (event) => {
          const { x, y } = event.points[0];
          const now = heat.sites[Number(element.dataset.site || 0)];
          const i = now.methods.indexOf(y), j = now.layers.map(String).indexOf(String(x));
          const words = Object.entries(heat.metrics)
            .filter(([key]) => now.metrics[key])
            .map(([key, label]) => `${label} ${fixed(now.metrics[key][i][j], 2)}`);
          document.getElementById(`${element.id}-answer`).textContent = `${y}, layer ${x}: ${words.join(", ")}`;
        });
      }
    },

    null(element, trait) {
      const n = trait.null, t = theme(), traces = [], shapes = [], annotations = [];
      const sample = n.sample, split = Boolean(sample && sample.length);
      if (split) {
        const bins = 20, counts = new Array(bins).fill(0);
        for (const value of sample) counts[Math.min(bins - 1, Math.floor(value * bins))] += 1;
        traces.push({
          type: "bar", x: counts.map((_, i) => (i + 0.5) / bins), y: counts, width: 0.9 / bins, marker: { color: faint(t.ctl, 0.75) },
          hovertemplate: "AUC %{x:.2f}: %{y} random directions<extra></extra>",
        });
        const place = n.best.val_auc;
        shapes.push({ type: "line", x0: place, x1: place, yref: "y domain", y0: 0, y1: 1, line: { color: t.pos, width: 3 } });
        annotations.push({
          x: place, yref: "y domain", y: 1, yanchor: "bottom", xanchor: place > 0.6 ? "right" : "left", showarrow: false,
          text: `the vector, ${fixed(place)}`, font: { color: t.pos, size: printing ? 8 : 11 },
        });
      }
      const line = (y, more) => ({ type: "scatter", mode: "lines", x: n.layers, y, xaxis: "x2", yaxis: "y2", ...more });
      traces.push(
        line(n.null_high, { line: { width: 0 }, hoverinfo: "skip" }),
        line(n.null_low, { line: { width: 0 }, fill: "tonexty", fillcolor: faint(t.ctl, 0.25), hoverinfo: "skip" }),
        line(n.null_mean, { line: { color: t.ctl, width: 1.2, dash: "dot" }, hovertemplate: "layer %{x}: random mean %{y:.2f}<extra></extra>" }),
        line(n.auc, {
          mode: "lines+markers", marker: { size: 4 }, line: { color: t.pos, width: 1.8 },
          hovertemplate: `${plain(n.best.method)}, layer %{x}: AUC %{y:.2f}<extra></extra>`,
        }),
        {
          type: "scatter", mode: "markers", x: [n.best.layer], y: [n.best.val_auc], xaxis: "x2", yaxis: "y2",
          marker: { symbol: "circle-open", size: 12, color: t.pos, line: { width: 2 } }, hoverinfo: "skip",
        },
      );
      show(element, traces, layout(t, {
        shapes, annotations, margin: { l: 40, r: 10, t: 22, b: 36 },
        ...(split
          ? {
              xaxis: axis(t, { domain: [0, 0.44], range: [0, 1.03], title: { text: narrow() ? "AUC of random" : `AUC of ${sample.length} random directions, layer ${n.best.layer}` } }),
              yaxis: axis(t, { nticks: 4 }),
            }
          : {}),
        xaxis2: axis(t, { domain: split ? [0.56, 1] : [0, 1], anchor: "y2", title: { text: narrow() ? "held-out AUC by layer" : "layer" } }),
        yaxis2: axis(t, { anchor: "x2", range: [0, 1.05], title: { text: narrow() ? "" : "held-out AUC" } }),
      }));
    },

    projections(element, trait) {
      const p = trait.projections, t = theme();
      const order = ["val negative", "val positive", "train negative", "train positive"].filter((name) => p.groups[name]);
      const traces = order.map((name, row) => {
        const values = p.groups[name], positive = name.endsWith("positive");
        return {
          type: "scatter", mode: "markers", x: values, y: values.map((_, i) => row + (((i * 7) % 11) - 5) * 0.05),
          marker: { color: faint(positive ? t.pos : t.neg, 0.75), size: 6, symbol: name.startsWith("val") ? "diamond" : "circle" },
          hovertemplate: `${name.replace("val", "held-out")}: %{x:.2f}<extra></extra>`,
        };
      });
      const shapes = p.threshold === null ? [] : [{ type: "line", x0: p.threshold, x1: p.threshold, yref: "paper", y0: 0, y1: 1, line: { color: t.ink, width: 1, dash: "dash" } }];
      show(element, traces, layout(t, {
        shapes, xaxis: axis(t, { title: { text: "projection on the unit vector" }, zeroline: false }),
        yaxis: axis(t, { tickvals: order.map((_, i) => i), ticktext: order.map((name) => name.replace("val", "held-out")), showgrid: false, zeroline: false, ticks: "" }),
      }));
    },

    histogram(element, trait) {
      const h = trait.histograms[Number(element.dataset.index)], t = theme(), traces = [];
      for (const [side, offset, colour] of [["negative", -4.4, t.neg], ["positive", 0, t.pos]]) {
        const kept = h.bins[side].kept, out = h.bins[side].left_out;
        const common = { type: "bar", x: kept.map((_, i) => 10 * i + 5), width: 4.2, offset };
        traces.push(
          {
            ...common, y: kept.map((n) => n || null), name: side, marker: { color: colour },
            hovertemplate: `${side}, kept: %{y}<extra></extra>`,
          },
          {
            ...common, y: out.map((n) => n || null), base: kept, showlegend: false, customdata: out,
            marker: { color: faint(colour, 0.18), line: { color: colour, width: 1 } },
            hovertemplate: `${side}, left out: %{customdata}<extra></extra>`,
          },
        );
      }
      const shapes = [["neg_threshold", t.neg], ["pos_threshold", t.pos]]
        .filter(([name]) => h.thresholds[name] !== undefined)
        .map(([name, colour]) => ({ type: "line", x0: h.thresholds[name], x1: h.thresholds[name], yref: "paper", y0: 0, y1: 1, line: { color: colour, width: 1, dash: "dot" } }));
      show(element, traces, layout(t, {
        shapes, barmode: "overlay", showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: printing ? 8 : 10.5 } },
        margin: { l: 36, r: 16, t: 30, b: 36 },
        xaxis: axis(t, { range: [0, 100], dtick: 20, title: { text: `score by ${plain(h.judge || "the judge")}` } }),
        yaxis: axis(t, { title: { text: h.subject } }),
      }));
    },

    dose(element, trait) {
      const d = trait.dose, t = theme(), traces = [];
      const hover = (what) => `${plain(what)}<br>dose %{x:.3f}: change %{y:+.1f}, coherence %{customdata:.0f}<extra></extra>`;
      const bars = (points, colour, width) => ({
        type: "data", symmetric: false, color: colour, thickness: width, width: 3,
        array: points.map((p) => (p.high === null ? 0 : p.high - p.change)), arrayminus: points.map((p) => (p.low === null ? 0 : p.change - p.low)),
      });
      const measured = (points) => points.filter((p) => p.change !== null);
      const pair = (points, upper, lower) => {
        const xs = points.map((p) => p.dose), coherence = points.map((p) => p.coherence);
        traces.push(
          { type: "scatter", x: xs, y: points.map((p) => p.change), customdata: coherence, ...upper },
          { type: "scatter", x: xs, y: coherence, yaxis: "y2", hovertemplate: "dose %{x:.3f}: coherence %{y:.0f}<extra></extra>", ...upper, ...lower, error_y: undefined, showlegend: false },
        );
      };
      let named = false;
      for (const curve of d.curves.filter((c) => !c.chosen)) {
        const points = measured(curve.search);
        if (!points.length) continue;
        pair(points, { mode: "lines", name: "others", legendgroup: "other", showlegend: !named, line: { color: faint(t.ctl, 0.45), width: 1 }, hovertemplate: hover(curve.label) }, {});
        named = true;
      }
      d.controls.forEach((p, i) => {
        if (p.change === null) return;
        const moved = { ...p, dose: p.dose * (1 + ((i % 5) - 2) * 0.012) };
        pair([moved], { mode: "markers", name: "random", legendgroup: "random", showlegend: i === 0, marker: { color: t.ctl, size: 6, symbol: "circle-open" }, error_y: bars([moved], faint(t.ctl, 0.6), 1), hovertemplate: hover(p.name) }, {});
      });
      for (const curve of d.curves.filter((c) => c.chosen)) {
        const points = measured(curve.search), origin = { dose: 0, change: 0, low: 0, high: 0, coherence: d.baseline.search ? d.baseline.search.coherence_mean : null };
        const whole = [origin, ...points], banded = whole.filter((p) => p.low !== null && p.high !== null);
        const edge = (y, more) => ({ type: "scatter", mode: "lines", x: banded.map((p) => p.dose), y, line: { width: 0 }, hoverinfo: "skip", showlegend: false, ...more });
        traces.push(edge(banded.map((p) => p.high), {}), edge(banded.map((p) => p.low), { fill: "tonexty", fillcolor: faint(t.pos, 0.16) }));
        pair(whole, { mode: "lines+markers", name: "chosen, search questions", line: { color: t.pos, width: 2 }, marker: { size: 5 }, hovertemplate: hover(`${curve.label}, search questions`) }, {});
        const report = measured(curve.report);
        if (report.length) pair(report, { mode: "markers", name: "chosen, report", marker: { color: t.pos, size: 11, symbol: "diamond", line: { color: t.surface, width: 1 } }, error_y: bars(report, t.pos, 1.8), hovertemplate: hover(`${curve.label}, report questions`) }, {});
      }
      const shapes = [{ type: "line", xref: "x domain", x0: 0, x1: 1, yref: "y2", y0: d.threshold, y1: d.threshold, line: { color: t.ink, width: 1, dash: "dot" } }];
      const annotations = [{ xref: "x domain", x: 1, xanchor: "right", yref: "y2", y: d.threshold, yanchor: "top", showarrow: false, text: `needed: ${d.threshold}`, font: { size: printing ? 8 : 10, color: t.muted } }];
      if (d.prompting && d.prompting.change !== null) {
        shapes.push({ type: "line", xref: "x domain", x0: 0, x1: 1, y0: d.prompting.change, y1: d.prompting.change, line: { color: t.prompt, width: 1.4, dash: "dash" } });
        annotations.push({ xref: "x domain", x: 0.01, xanchor: "left", y: d.prompting.change, yanchor: "bottom", showarrow: false, text: `a system prompt ${signed(d.prompting.change)}`, font: { size: printing ? 8 : 10.5, color: t.prompt } });
      }
      show(element, traces, layout(t, {
        shapes, annotations, showlegend: true, margin: { l: 46, r: 10, t: 30, b: 36 },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: printing ? 8 : 10.5 } },
        xaxis: axis(t, { rangemode: "tozero", title: { text: "dose (‖added‖ ÷ median ‖h‖)" }, anchor: "y2" }),
        yaxis: axis(t, { domain: [0.38, 1], title: { text: narrow() ? "change" : "change of trait score" }, zerolinecolor: t.muted }),
        yaxis2: axis(t, { domain: [0, 0.27], range: [0, 104], title: { text: "coherence" }, nticks: 4 }),
      }));
    },

    cosine(element) {
      square(element, data.across.cosine, -1, 1, "cosine");
    },
    cross(element) {
      square(element, data.across.cross_auc, 0, 1, "AUC");
    },
  };

  function square(element, matrix, low, high, what) {
    const t = theme(), few = matrix.traits.length <= 10;
    show(element, [{
      type: "heatmap", x: matrix.traits, y: matrix.traits, z: matrix.matrix, zmin: low, zmax: high, colorscale: diverging(t), xgap: 1, ygap: 1, hoverongaps: false,
      ...(few ? { text: matrix.matrix.map((line) => line.map((v) => fixed(v))), texttemplate: "%{text}" } : {}),
      colorbar: { thickness: 9, outlinewidth: 0, tickfont: { size: 10 } },
      hovertemplate: `%{y} and %{x}: ${what} %{z:.2f}<extra></extra>`,
    }], layout(t, {
      xaxis: axis(t, { type: "category", showgrid: false, ticks: "", tickangle: matrix.traits.length <= 3 && !narrow() ? 0 : -30 }),
      yaxis: axis(t, { type: "category", autorange: "reversed", showgrid: false, ticks: "" }),
    }));
  }

  const all = [...document.querySelectorAll(".chart")];
  const drawn = new Set();
  const draw = (element) => {
    drawn.add(element);
    charts[element.dataset.chart](element, data.traits[element.dataset.trait]);
  };
  // a long report draws what is near; the rest when it is scrolled to, or printed
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "800px" });
  all.forEach((element) => near.observe(element));
  const redraw = () => drawn.forEach(draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  phone.addEventListener("change", redraw);
  // on paper nothing can be unfolded
  let unfolded = [];
  window.addEventListener("beforeprint", () => {
    printing = true;
    root.dataset.print = "1";
    unfolded = [...document.querySelectorAll("details.block:not([open])")];
    unfolded.forEach((fold) => (fold.open = true));
    all.forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    delete root.dataset.print;
    unfolded.forEach((fold) => (fold.open = false));
    redraw();
  });

  for (const [name, selector] of [["metric", "select.metric"], ["site", "select.site"]]) {
    document.querySelectorAll(selector).forEach((select) => {
      select.addEventListener("change", () => {
        const element = document.getElementById(select.dataset.for);
        element.dataset[name] = select.value;
        draw(element);
      });
    });
  }

  // Texts

  const option = (value, text) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    return made;
  };
  const scores = (answer) => {
    if (!answer) return "";
    const words = [`trait ${fixed(answer.trait, 0)}`, `coherence ${fixed(answer.coherence, 0)}`, `distinct 3-grams ${fixed(answer.distinct_3)}`];
    if (answer.abstained) words.push(`judge abstained: ${answer.abstained}`);
    if (answer.cut) words.push("cut at the length limit");
    return words.join(" · ");
  };

  document.querySelectorAll(".samples").forEach((box) => {
    const { arms, questions, best_dose: bestDose } = data.traits[box.dataset.trait].samples;
    const find = (name) => box.querySelector(name);
    const question = find(".question"), arm = find(".arm"), dose = find(".dose");
    for (const [half, label] of [["search", "search questions (every dose)"], ["report", "report questions (the verdict)"]]) {
      const group = document.createElement("optgroup");
      group.label = label;
      questions.forEach((q, i) => {
        if (q.half === half) group.append(option(i, q.question));
      });
      if (group.children.length) question.append(group);
    }
    let wanted = bestDose;
    const current = () => questions[Number(question.value)];
    const listArms = () => {
      const before = arm.value, there = arms.filter((a) => current().answers[a.id]);
      arm.replaceChildren(...there.map((a) => option(a.id, a.label)));
      if (there.some((a) => a.id === before)) arm.value = before;
    };
    const steps = () => (arm.value ? current().answers[arm.value] : []);
    const listDoses = () => {
      const answers = steps(), prompted = answers.length === 1 && answers[0].dose === null;
      dose.disabled = prompted || !answers.length;
      dose.max = String(Math.max(1, answers.length));
      const closest = answers.reduce((at, a, i) => (Math.abs((a.dose ?? 0) - (wanted ?? 0)) < Math.abs((answers[at].dose ?? 0) - (wanted ?? 0)) ? i : at), 0);
      dose.value = String(answers.length ? (wanted === 0 && !prompted ? 0 : closest + 1) : 0);
    };
    const showTexts = () => {
      const answers = steps(), at = Number(dose.value), plainAnswer = current().unsteered;
      const steered = at === 0 ? plainAnswer : answers[at - 1];
      const value = at === 0 ? 0 : steered.dose;
      const words = value === null ? "no dose" : at === 0 ? "0, unsteered" : fixed(value, 3).replace(/0$/, "") + (value === bestDose ? ", chosen" : "");
      find(".dose-value").textContent = words;
      dose.setAttribute("aria-valuetext", words);
      find(".steered-title").textContent = at === 0 ? "steered (dose 0)" : `steered: ${arm.selectedOptions[0].textContent}`;
      find(".plain").textContent = plainAnswer ? plainAnswer.text : "";
      find(".steered").textContent = steered ? steered.text : "";
      find(".plain-scores").textContent = scores(plainAnswer);
      find(".steered-scores").textContent = scores(steered);
    };
    const refresh = () => { listDoses(); showTexts(); };
    question.addEventListener("change", () => { listArms(); refresh(); });
    arm.addEventListener("change", refresh);
    dose.addEventListener("input", () => {
      const at = Number(dose.value);
      wanted = at === 0 ? 0 : steps()[at - 1].dose;
      showTexts();
    });
    listArms();
    refresh();
  });

  // A link to a manifest opens the folded part it stands in
  const reveal = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", reveal);
  reveal();
})();
