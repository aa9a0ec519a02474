//! Loads an image archive into a store and prints what came of it: `load STORE ARCHIVE [NAME]`.

use std::path::Path;
use std::time::Instant;

use cloche_images::{LayerStart, LoadOptions, Progress, Store};

/// Prints a line for each layer.
struct Lines;

impl Progress for Lines {
    fn layer_started(&self, layer: &LayerStart) {
        let LayerStart { index, count, diff_id, bytes, present } = layer;
        let what = if *present { "checking" } else { "converting" };
        eprintln!("layer {}/{count}: {what} {diff_id}, {} KiB", index + 1, bytes >> 10);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, archive, name @ ..] = arguments.as_slice() else {
        return Err("usage: load STORE ARCHIVE [NAME]".into());
    };
    let name = name.first().map(|name| name.parse()).transpose()?;
    let store = Store::open(Path::new(store))?;
    let start = Instant::now();
    let result = store.load(Path::new(archive), &LoadOptions { name }, &Lines);
    let loaded = match result {
        Ok(loaded) => loaded,
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                eprintln!("{error}");
                cause = error.source();
            }
            std::process::exit(1);
        }
    };
    eprintln!("loaded in {:.3} s", start.elapsed().as_secs_f64());
    for image in loaded {
        let image = store.resolve(&image.id.to_string())?;
        println!("{}", serde_json::to_string_pretty(&image.inspect())?);
        for layer in &image.layers {
            println!("{}", layer.erofs.display());
        }
    }
    Ok(())
}
