//! `cloche history` and `cloche image layers`: how an image was made, as tables and as a picture.

use std::{fmt::Write, fs, process::ExitCode};

use anyhow::Context;
use cloche_images::LayerReport;

use super::{image::store, print_json};
use crate::{
    arguments::{Global, History, Layers},
    render,
};

/// Letters of a step that a table shows.
const STEP: usize = 45;
/// Height of one layer's line in the picture, and the width of the longest bar.
const LINE: usize = 34;
const BAR: f64 = 420.0;

/// Shows how an image was made.
pub fn history(global: &Global, arguments: &History) -> anyhow::Result<ExitCode> {
    let history = store(global)?.resolve(&arguments.image)?.history();
    if arguments.json {
        print_json(&history)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![["LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"].map(String::from).to_vec()];
    rows.extend(history.iter().map(|entry| {
        let layer = entry.layer.map_or("<none>".to_owned(), |layer| layer.hex().chars().take(12).collect());
        let created = entry.created.as_deref().and_then(|created| created.get(..10)).unwrap_or("–");
        let step = if arguments.no_trunc { visible(&entry.created_by) } else { shortened(&entry.created_by) };
        vec![layer, created.to_owned(), step, render::bytes(entry.size), visible(&entry.comment)]
    }));
    print!("{}", render::table(&rows, &[3]));
    Ok(ExitCode::SUCCESS)
}

/// Shows what each layer is for.
pub fn layers(global: &Global, arguments: &Layers) -> anyhow::Result<ExitCode> {
    let reports = store(global)?.layers_of(&arguments.image)?;
    if let Some(path) = &arguments.html {
        let page = page(&arguments.image, &reports)?;
        fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if arguments.json {
        print_json(&reports)?;
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["LAYER", "SIZE", "TRAVELS", "STORED", "ADDED", "CHANGED", "HIDDEN", "WASTED", "CREATED BY"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(reports.iter().map(|report| {
        vec![
            report.diff_id.hex().chars().take(12).collect(),
            render::bytes(report.bytes),
            report.blob_bytes.map_or("–".to_owned(), render::bytes),
            render::bytes(report.stored_bytes),
            report.added.to_string(),
            report.changed.to_string(),
            report.hidden.to_string(),
            render::bytes(report.wasted),
            shortened(&report.created_by),
        ]
    }));
    print!("{}", render::table(&rows, &[1, 2, 3, 4, 5, 6, 7]));
    let (bytes, wasted) = totals(&reports);
    println!("{} in files, of which {} are wasted", render::bytes(bytes), render::bytes(wasted));
    Ok(ExitCode::SUCCESS)
}

fn totals(reports: &[LayerReport]) -> (u64, u64) {
    let sum = |of: fn(&LayerReport) -> u64| reports.iter().map(of).sum();
    (sum(|report| report.bytes), sum(|report| report.wasted))
}

/// Text of an image's author, fit for a terminal.
fn visible(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn shortened(step: &str) -> String {
    // What Docker's builder puts before each step says nothing.
    let step = step.strip_prefix("/bin/sh -c #(nop) ").unwrap_or(step).trim();
    let words = visible(step);
    match words.chars().count() > STEP {
        true => words.chars().take(STEP - 1).chain(['…']).collect(),
        false => words,
    }
}

/// The layers as bars, the base at the bottom; what nobody sees is of another colour.
fn page(image: &str, reports: &[LayerReport]) -> Result<String, std::fmt::Error> {
    let most = reports.iter().map(|report| report.bytes).max().unwrap_or(0).max(1) as f64;
    let (bytes, wasted) = totals(reports);
    let mut svg = String::new();
    for (index, report) in reports.iter().rev().enumerate() {
        let y = index * LINE;
        let width = |bytes: u64| bytes as f64 / most * BAR;
        let (whole, lost) = (width(report.bytes).max(1.0), width(report.wasted));
        let seen = whole - lost;
        write!(
            svg,
            r#"<g transform="translate(0 {y})"><title>{}</title><text x="0" y="14" class="step">{}</text><text x="0" y="28" class="id">{}</text><rect x="400" y="6" width="{seen:.1}" height="16" class="seen"/><rect x="{:.1}" y="6" width="{lost:.1}" height="16" class="lost"/><text x="{:.1}" y="18">{}{} · +{} ~{} −{}</text></g>"#,
            escaped(&visible(&report.created_by)),
            escaped(&shortened(&report.created_by)),
            report.diff_id.hex().chars().take(12).collect::<String>(),
            400.0 + seen,
            408.0 + whole,
            render::bytes(report.bytes),
            if report.wasted > 0 {
                format!(" ({} wasted)", render::bytes(report.wasted))
            } else {
                String::new()
            },
            report.added,
            report.changed,
            report.hidden,
        )?;
    }
    let height = reports.len() * LINE;
    Ok(format!(
        r#"<!doctype html><html lang="en"><meta charset="utf-8"><title>Layers of {name}</title><style>
:root {{ color-scheme: light dark }} body {{ font: 14px system-ui, sans-serif; margin: 2em }}
text {{ font: 12px system-ui, sans-serif; fill: currentColor }} .step {{ font-family: ui-monospace, monospace }}
.id {{ font-size: 10px; opacity: .6 }} .seen {{ fill: #3a7d5c }} .lost {{ fill: #c2553d }}
</style><h1>{name}</h1><p>{count} layers, {bytes} in files, of which <b>{wasted}</b> are wasted: changed or removed by a layer above.
Added (+), changed (~) and removed (−) files are beside the bars; the base is at the bottom.</p>
<svg xmlns="http://www.w3.org/2000/svg" width="1100" height="{height}" viewBox="0 0 1100 {height}" role="img" aria-label="Layers">{svg}</svg></html>
"#,
        name = escaped(image),
        count = reports.len(),
        bytes = render::bytes(bytes),
        wasted = render::bytes(wasted),
    ))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_is_cut_and_cannot_steer_the_terminal_or_the_page() {
        assert_eq!(shortened("/bin/sh -c #(nop)  CMD [\"sh\"]"), "CMD [\"sh\"]");
        assert_eq!(shortened("a\x1b[2Jb"), "a [2Jb");
        assert_eq!(shortened(&"x".repeat(100)).chars().count(), STEP);
        assert_eq!(escaped("<b>&\""), "&lt;b&gt;&amp;&quot;");
    }
}
