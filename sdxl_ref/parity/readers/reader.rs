// A trace against a kit, in Rust without dependencies: rustc --edition 2021 -O reader.rs && ./reader KIT_DIR trace.safetensors
// Prints the first point that is off by more than its budget along the run. Status 0: agrees, 1: differs, 2: bad input.
// The forms of a trace, of a sketch and of a kit: FORMAT.md beside.
use std::{env, fs, process::exit};

struct File {
    header: String,
    data: Vec<u8>,
}

fn open(path: &str) -> Result<File, String> {
    let all = fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let start: [u8; 8] = all.get(..8).and_then(|s| s.try_into().ok()).ok_or(format!("{path} is no whole safetensors file"))?;
    let end = 8usize.saturating_add(u64::from_le_bytes(start) as usize);
    let header = all.get(8..end).ok_or(format!("{path} is no whole safetensors file"))?;
    Ok(File { header: String::from_utf8_lossy(header).into_owned(), data: all[end..].to_vec() })
}

fn half(h: u16) -> f64 {
    let (exponent, mantissa) = ((h >> 10 & 31) as i32, (h & 1023) as f64);
    let size = match exponent {
        31 => if mantissa > 0.0 { f64::NAN } else { f64::INFINITY },
        0 => mantissa * 2f64.powi(-24),
        _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
    };
    if h >> 15 == 1 { -size } else { size }
}

/// Entries look like "NAME":{"dtype":"F32","shape":[…],"data_offsets":[a,b]}; the metadata has no such key.
fn tensor(file: &File, name: &str) -> Option<Vec<f64>> {
    let wanted = format!("\"{name}\":{{\"dtype\":\"");
    let entry = &file.header[file.header.find(&wanted)? + wanted.len()..];
    let offsets = &entry[entry.find("\"data_offsets\":[")? + 16..];
    let (a, b) = offsets[..offsets.find(']')?].split_once(',')?;
    let bytes = file.data.get(a.parse().ok()?..b.parse().ok()?)?;
    let values = |width: usize, read: fn(&[u8]) -> f64| bytes.chunks(width).map(read).collect();
    Some(match &entry[..entry.find('"')?] {
        "F64" => values(8, |c| f64::from_le_bytes(c.try_into().unwrap())),
        "F32" => values(4, |c| f32::from_le_bytes(c.try_into().unwrap()) as f64),
        "I64" => values(8, |c| i64::from_le_bytes(c.try_into().unwrap()) as f64),
        "F16" => values(2, |c| half(u16::from_le_bytes(c.try_into().unwrap()))),
        "BF16" => values(2, |c| f32::from_bits((u16::from_le_bytes(c.try_into().unwrap()) as u32) << 16) as f64),
        _ => return None,
    })
}

fn sketch(values: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; 1024];
    for (i, value) in values.iter().enumerate() {
        let mut z = (i as u64 + 1).wrapping_mul(0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        z ^= z >> 31;
        sums[(z & 1023) as usize] += if z & 1024 != 0 { -value } else { *value };
    }
    sums
}

fn relative(a: &[f64], b: &[f64], norm: Option<f64>) -> f64 {
    let gap: f64 = a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum();
    let size = norm.unwrap_or_else(|| b.iter().map(|y| y * y).sum::<f64>().sqrt());
    if size > 0.0 { gap.sqrt() / size } else if gap > 0.0 { f64::INFINITY } else { 0.0 }
}

fn compare(folder: &str, path: &str) -> Result<i32, String> {
    let (kit, theirs) = (open(&format!("{folder}/kit.safetensors"))?, open(path)?);
    let budgets = fs::read_to_string(format!("{folder}/budgets.tsv")).map_err(|error| error.to_string())?;
    let mut met = 0;
    for line in budgets.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let (name, budget, norm) = (fields[0], fields[1].parse::<f64>().unwrap(), fields[2].parse::<f64>().unwrap());
        let Some(values) = tensor(&theirs, name) else { continue };
        let off = match (tensor(&kit, name), tensor(&kit, &format!("{name}:sketch"))) {
            (Some(whole), _) if whole.len() == values.len() => relative(&values, &whole, None),
            (None, Some(sums)) => relative(&sketch(&values), &sums, Some(norm)),
            _ => continue,
        };
        met += 1;
        if !(off <= budget) {
            println!("differs at {name}: {off:.2e}, budget {budget:.2e}");
            return Ok(1);
        }
    }
    if met == 0 { return Err(format!("no point of the kit is in {path}")); }
    println!("agrees: {met} points");
    Ok(0)
}

fn main() {
    let args: Vec<String> = env::args().collect();
    let result = if args.len() == 3 { compare(&args[1], &args[2]) } else { Err("usage: reader KIT_DIR trace.safetensors".into()) };
    exit(result.unwrap_or_else(|error| { eprintln!("{error}"); 2 }));
}
